"""A stored sample becomes a row of fixed length; rows become a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from megamm.batch import IGNORE_INDEX, Batch


class Row(NamedTuple):
    """One sample at sequence length S.

    Attributes:
        input_ids, labels: [S] int64; see Batch.
        num_images, num_dropped_images: images that are left, and that truncation took (the last ones).
        truncated: something was cut off.
        learnt: at least one position carries loss.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    num_images: int
    num_dropped_images: int
    truncated: bool
    learnt: bool


class Assembler:
    """Brings samples to `sequence_length` positions and at most `max_images` images, each of which takes
    `tokens_per_image` positions."""

    def __init__(
        self, sequence_length: int, tokens_per_image: int, image_id: int, pad_id: int, max_images: int
    ):
        self.sequence_length, self.max_images = sequence_length, max_images
        self.tokens_per_image = tokens_per_image
        self.image_id, self.pad_id = image_id, pad_id

    def row(self, tokens: np.ndarray, learnt: np.ndarray) -> Row:
        """The row of a sample with ids `tokens` [n], learnt where `learnt` [n] is not 0.

        Too long a sample is cut at S, or before the image that would be cut through or is one too
        many; that image and those after it are dropped. The last position that is kept predicts nothing.
        """
        is_image = tokens == self.image_id
        images = np.flatnonzero(is_image)
        ends = images + 1 + (self.tokens_per_image - 1) * np.arange(1, len(images) + 1)
        length = len(tokens) + (self.tokens_per_image - 1) * len(images)
        kept = min(length, self.sequence_length)
        num_images = min(int(np.searchsorted(ends, kept, side="right")), self.max_images)
        if num_images < len(images):
            kept = min(kept, int(ends[num_images]) - self.tokens_per_image)
        if self.tokens_per_image > 1 and len(images):
            repeats = np.where(is_image, self.tokens_per_image, 1)
            tokens, learnt = np.repeat(tokens, repeats), np.repeat(learnt, repeats)
        input_ids = np.full(self.sequence_length, self.pad_id, np.int64)
        input_ids[:kept] = tokens[:kept]
        labels = np.full(self.sequence_length, IGNORE_INDEX, np.int64)
        targets = learnt[1:kept] != 0
        np.copyto(labels[: max(kept - 1, 0)], tokens[1:kept], where=targets)
        return Row(
            input_ids, labels, num_images, len(images) - num_images, kept < length, bool(targets.any())
        )


def collate(
    rows: Sequence[Row],
    images: Sequence[torch.Tensor],
    image_size: int,
    sample_ids: Sequence[int],
    num_skipped: int,
) -> Batch:
    """The micro-batch of `rows`; `images` are those of all rows in their order."""
    input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]))
    positions = torch.arange(input_ids.shape[1]).repeat(len(rows), 1)
    return Batch(
        input_ids=input_ids,
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        position_ids=positions,
        images=torch.stack(list(images)) if images else torch.empty(0, 3, image_size, image_size),
        images_per_sample=torch.tensor([row.num_images for row in rows], dtype=torch.int64),
        sample_ids=torch.tensor(list(sample_ids), dtype=torch.int64),
        num_skipped=num_skipped,
    )
