"""The rows of a dataset with images and those without, numbered among themselves, without a list of either.

Kept is how many rows with images come before each block of ROWS_PER_BLOCK rows: an eighth of a byte per row.
The n-th row of a kind is found in its block, whose image counts are read again.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from megamm.data.indexed import PreparedDataset

ROWS_PER_BLOCK = 64
_SCAN = 1 << 20  # rows that are looked at together, a multiple of ROWS_PER_BLOCK


class RowsOfKind:
    """The rows of one kind of a dataset that begins at row `first` of several that are numbered through."""

    def __init__(self, dataset: PreparedDataset, first: int, with_images: bool, before: np.ndarray) -> None:
        """
        Args:
            before: [blocks + 1] how many rows of the kind come before each block, and there are in all.
        """
        self._dataset, self._first, self._with_images, self._before = dataset, first, with_images, before

    def __len__(self) -> int:
        return int(self._before[-1])

    def at(self, numbers: np.ndarray) -> np.ndarray:
        """[n] int64 rows, numbered through: the `numbers`-th (from 0) [n] rows of the kind."""
        blocks = np.searchsorted(self._before, numbers, side="right") - 1
        inside = numbers - self._before[blocks]
        rows = blocks[:, None] * ROWS_PER_BLOCK + np.arange(ROWS_PER_BLOCK)
        rows = np.minimum(rows, len(self._dataset) - 1)  # repeats of the last one come behind it
        _, images = self._dataset.sizes(rows.reshape(-1))
        is_kind = (images.reshape(rows.shape) > 0) == self._with_images
        places = (is_kind.cumsum(axis=1) > inside[:, None]).argmax(axis=1)
        return self._first + rows[np.arange(len(rows)), places]


def split_by_kind(
    dataset: PreparedDataset, first: int
) -> dict[Literal["images", "text"], range | RowsOfKind]:
    """The rows with images and those without of a dataset that begins at row `first` of several that are
    numbered through. A kind without any row is left out."""
    size, counts = len(dataset), []
    for start in range(0, size, _SCAN):
        _, images = dataset.sizes(np.arange(start, min(start + _SCAN, size)))
        counts.append(np.add.reduceat(images > 0, np.arange(0, len(images), ROWS_PER_BLOCK), dtype=np.int64))
    with_images = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    if with_images[-1] in (0, size):
        return {"images" if with_images[-1] else "text": range(first, first + size)}
    all_rows = np.minimum(np.arange(len(with_images)) * ROWS_PER_BLOCK, size)
    return {
        "images": RowsOfKind(dataset, first, True, with_images),
        "text": RowsOfKind(dataset, first, False, all_rows - with_images),
    }
