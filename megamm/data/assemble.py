"""A stored sample becomes a document of at most so many positions; documents become a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from megamm.batch import IGNORE_INDEX, Batch


class Document(NamedTuple):
    """One sample, cut to fit, without padding.

    Attributes:
        input_ids, labels: [L] int64, L > 0; see Batch.
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


@dataclass(frozen=True)
class Assembler:
    """Expands images to the positions they take, cuts, and shifts labels.

    Attributes:
        tokens_per_image: positions of an image.
        image_id, pad_id: of the tokenizer.
    """

    tokens_per_image: int
    image_id: int
    pad_id: int

    def kept(self, tokens: np.ndarray, max_length: int, max_images: int) -> tuple[int, int]:
        """(positions, images) that are left of a sample with ids `tokens` [n].

        Too long a sample is cut at `max_length` positions, or before the image that would be cut through
        or is one too many; that image and those after it are dropped. A sample that loses everything
        keeps one position of padding.
        """
        images = np.flatnonzero(tokens == self.image_id)
        ends = images + 1 + (self.tokens_per_image - 1) * np.arange(1, len(images) + 1)
        kept = min(len(tokens) + (self.tokens_per_image - 1) * len(images), max_length)
        num_images = min(int(np.searchsorted(ends, kept, side="right")), max_images)
        if num_images < len(images):
            kept = min(kept, int(ends[num_images]) - self.tokens_per_image)
        return max(kept, 1), num_images

    def document(self, tokens: np.ndarray, learnt: np.ndarray, max_length: int, max_images: int) -> Document:
        """The document of a sample with ids `tokens` [n], learnt where `learnt` [n] is not 0, cut as `kept`
        says. Its last position predicts nothing."""
        is_image = tokens == self.image_id
        num_placeholders = int(is_image.sum())
        kept, num_images = self.kept(tokens, max_length, max_images)
        if self.tokens_per_image > 1 and num_placeholders:
            repeats = np.where(is_image, self.tokens_per_image, 1)
            tokens, learnt = np.repeat(tokens, repeats), np.repeat(learnt, repeats)
        input_ids = tokens[:kept].astype(np.int64)
        if kept == 1 and num_images == 0 and is_image[0]:
            input_ids[:] = self.pad_id
        labels = np.full(kept, IGNORE_INDEX, np.int64)
        targets = learnt[1:kept] != 0
        np.copyto(labels[:-1], tokens[1:kept], where=targets)
        return Document(
            input_ids,
            labels,
            num_images,
            num_placeholders - num_images,
            kept < len(tokens) or num_images < num_placeholders,
            bool(targets.any()),
        )

    def batch(
        self,
        documents: Sequence[Document],
        length: int,
        packed: bool,
        images: Sequence[torch.Tensor],
        image_size: int,
        sample_ids: Sequence[int],
        num_skipped: int,
    ) -> Batch:
        """The micro-batch of `documents`.

        Args:
            length: positions of a row.
            packed: all documents in one row; otherwise each has its own.
            images: [3, image_size, image_size] each, those of all documents in their order.
        """
        rows = [documents] if packed else [[document] for document in documents]
        input_ids = np.full((len(rows), length), self.pad_id, np.int64)
        labels = np.full((len(rows), length), IGNORE_INDEX, np.int64)
        position_ids = np.tile(np.arange(length), (len(rows), 1))
        used = 0
        for number, row in enumerate(rows):
            end = 0
            for document in row:
                start, end = end, end + len(document.input_ids)
                input_ids[number, start:end] = document.input_ids
                labels[number, start:end] = document.labels
                position_ids[number, start:] = np.arange(length - start)
            if packed:
                position_ids[number, end:] = np.arange(length - end)
            used += end
        lengths = [len(d.input_ids) for d in documents] if packed else [length] * len(rows)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            images=torch.stack(list(images)) if images else torch.empty(0, 3, image_size, image_size),
            images_per_sample=torch.tensor([sum(d.num_images for d in row) for row in rows]),
            sample_ids=torch.tensor(list(sample_ids), dtype=torch.int64),
            num_skipped=num_skipped,
            packed=packed,
            num_padding=input_ids.size - used,
            num_labels=int((labels != IGNORE_INDEX).sum()),
            num_pairs=sum(n * n for n in lengths) // 2,
        )
