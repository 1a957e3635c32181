"""Several samples in one row: how many of the next samples go into the rows of a step, and which where."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def pack_prefix(
    lengths: np.ndarray, images: np.ndarray, num_rows: int, capacity: int, max_images: int
) -> list[list[int]]:
    """Put the first n samples whole into `num_rows` rows, n as large as this finds it to be.

    A step has to use samples without gaps for its end to be one number, and so the choice is n alone.
    One pass in the given order, each sample into the fullest row that has room, gives an n; then larger
    ones are tried with the samples sorted, the most demanding first (best fit decreasing, with positions
    and images as two dimensions of one size: Panigrahy et al., "Heuristics for vector bin packing", 2011).

    Args:
        lengths, images: [m] positions and images of the samples, at least one of which does not fit any
            more; none is larger than a row.
        capacity, max_images: of each row.
    Returns:
        For each row, the samples 0 ... n - 1 that lie in it, ascending; no row is empty. Every sample of
        the step is in one row, and sample n fits in none of them.
    """
    fits_in_all = (np.cumsum(lengths) <= num_rows * capacity) & (np.cumsum(images) <= num_rows * max_images)
    most = int(np.count_nonzero(fits_in_all))
    if most == len(lengths):
        raise ValueError("all samples might fit; the step may need more of them")
    needs = np.array([lengths, images]).T.tolist()
    rows = _Rows(num_rows, capacity, max_images)
    count = rows.extend(needs, 0)
    demand = lengths / capacity + images / max(max_images, 1)
    while count < most:  # whether a number fits is taken to be monotonous: a miss costs a little padding
        middle = (count + most + 1) // 2
        trial = _Rows(num_rows, capacity, max_images)
        order = np.argsort(-demand[:middle], kind="stable").tolist()
        if all(trial.add(sample, *needs[sample]) for sample in order):
            rows, count = trial, middle
        else:
            most = middle - 1
    rows.extend(needs, count)
    return [sorted(row) for row in rows.samples]


class _Rows:
    """Rows that are being filled."""

    def __init__(self, num_rows: int, capacity: int, max_images: int) -> None:
        self.samples: list[list[int]] = [[] for _ in range(num_rows)]
        self._images_left = [max_images] * num_rows
        self._room = [(capacity, row) for row in range(num_rows)]  # sorted, the fullest row first

    def add(self, sample: int, length: int, images: int) -> bool:
        """Put a sample into the fullest row that has room for it; False: none has."""
        for place in range(bisect_left(self._room, (length, -1)), len(self._room)):
            left, row = self._room[place]
            if images <= self._images_left[row]:
                del self._room[place]
                insort(self._room, (left - length, row))
                self._images_left[row] -= images
                self.samples[row].append(sample)
                return True
        return False

    def extend(self, needs: list[list[int]], start: int) -> int:
        """Add the samples from `start` on up to the first that does not fit; its number."""
        while self.add(start, *needs[start]):
            start += 1
        return start
