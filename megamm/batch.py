"""The batch: what the data path hands to the models (shared, so it lies on the ground floor).

Shape letters used everywhere in megamm: B rows of a micro-batch, S positions of a row, N images of a
micro-batch, P feature positions of an image, D documents of a packed row, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

IGNORE_INDEX = -100  # label of a position that carries no loss (PyTorch's convention)


@dataclass
class Batch:
    """One micro-batch: B samples, each in a padded row of its own; or, if `packed`, one row (B is 1, S is
    micro_batch_size * sequence_length) that holds D whole samples ("documents") one after the other, then
    padding. A document attends to itself alone, and so does the padding, as if it were one more.

    Attributes:
        input_ids: [B, S] int64. An image stands in the sequence as its placeholder token: once per
            image for cross-attention models, once per image feature for merged models.
        labels: [B, S] int64, already shifted: `labels[b, t]` is the token to predict from position t,
            or IGNORE_INDEX where there is no loss. The last position of a document predicts nothing.
        position_ids: [B, S] int64, counted from the start of the row or, if packed, of the document; the
            padding of a packed row starts again at 0.
        images: [N, 3, height, width] float32, normalised, in the order of their placeholders
            (sample by sample, left to right); N may be 0.
        images_per_sample: [B] int64, sums to N: the images of each row.
        sample_ids: [B] int64 or, if packed, [D]: dataset index of each sample (for logs and fault reports).
        step_start: how many samples of the stage had been used when this step began, the same in all layouts.
        num_skipped: samples that were replaced since the previous batch because an image was unreadable.
        packed: the row holds several documents.
        num_padding: positions of the rows that hold no sample.
        num_labels: positions that carry loss.
        num_pairs: pairs of a position and one that it attends to, counted as half of the square of each row
            or, if packed, of each document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    images: torch.Tensor
    images_per_sample: torch.Tensor
    sample_ids: torch.Tensor
    step_start: int = 0
    num_skipped: int = 0
    packed: bool = False
    num_padding: int = 0
    num_labels: int = 0
    num_pairs: int = 0

    @property
    def num_images(self) -> int:
        return int(self.images.shape[0])

    def document_lengths(self) -> list[int]:
        """Lengths of the documents of a packed row, the padding behind them last; they sum to S.

        Waits for the device if the batch lies on one.

        Raises:
            ValueError: the batch is not packed.
        """
        if not self.packed:
            raise ValueError("only a packed batch has documents; the rows of this one are its samples")
        starts = torch.nonzero(self.position_ids[0] == 0).flatten().tolist()
        ends = [*starts[1:], self.position_ids.shape[1]]
        return [end - start for start, end in zip(starts, ends, strict=True)]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **tensors)
