"""The batch: what the data path hands to the models (shared, so it lies on the ground floor).

Shape letters used everywhere in megamm: B samples of a micro-batch, S tokens of a sequence,
N images of a micro-batch, P feature positions of an image, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

IGNORE_INDEX = -100  # label of a position that carries no loss (PyTorch's convention)


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        input_ids: [B, S] int64. An image stands in the sequence as its placeholder token: once per
            image for cross-attention models, once per image feature for merged models.
        labels: [B, S] int64, already shifted: `labels[b, t]` is the token to predict from position t,
            or IGNORE_INDEX where there is no loss.
        position_ids: [B, S] int64.
        images: [N, 3, height, width] float32, normalised, in the order of their placeholders
            (sample by sample, left to right); N may be 0.
        images_per_sample: [B] int64, sums to N.
        sample_ids: [B] int64, dataset index of each sample (for logs and fault reports).
        num_skipped: samples that were replaced since the previous batch because an image was unreadable.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    images: torch.Tensor
    images_per_sample: torch.Tensor
    sample_ids: torch.Tensor
    num_skipped: int = 0

    @property
    def num_images(self) -> int:
        return int(self.images.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **tensors)
