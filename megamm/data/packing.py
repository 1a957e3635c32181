"""Several samples in one row: how many of the next samples go into the rows of a step, and which where."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

WINDOW = 40  # samples that a row is filled from: more of them cost time and give nothing


def pack_prefix(
    lengths: np.ndarray, images: np.ndarray, num_rows: int, capacity: int, max_images: int
) -> list[list[int]]:
    """Put the first n samples whole into `num_rows` rows, n as large as this finds it to be.

    A step has to use samples without gaps for its end to be one number, and so the choice is n alone.
    One pass in the given order, each sample into the fullest row that has room, gives an n; then larger
    ones are tried, row by row (`_fill_rows`) or, where images are what is scarce, with the samples sorted,
    the most demanding first (best fit decreasing, with positions and images as two dimensions of one size:
    Panigrahy et al., "Heuristics for vector bin packing", 2011).

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
    by_rows = lengths[:most].sum() * max_images >= images[:most].sum() * capacity  # positions are scarcer
    demand = lengths / capacity + images / max(max_images, 1)
    while count < most:  # whether a number fits is taken to be monotonous: a miss costs a little padding
        middle = (count + most + 1) // 2
        trial = _Rows(num_rows, capacity, max_images)
        filled = _fill_rows(needs[:middle], num_rows, capacity, max_images) if by_rows else None
        if filled is not None:
            trial.take(filled, needs)
        order = np.argsort(-demand[:middle], kind="stable").tolist()
        if filled is not None or all(trial.add(sample, *needs[sample]) for sample in order):
            rows, count = trial, middle
        else:
            most = middle - 1
    rows.extend(needs, count)
    return [sorted(row) for row in rows.samples]


def _fill_rows(
    needs: list[list[int]], num_rows: int, capacity: int, max_images: int
) -> list[list[int]] | None:
    """All samples in rows that are filled one after the other: the first that is left, and those of the
    WINDOW behind it that fill the row best (minimum bin slack: Gupta and Ho, "A new heuristic algorithm for
    the one-dimensional bin-packing problem", 1999). The lengths that are left stay as mixed as they were, so
    the last rows are filled as well as the first. None: some samples are left over.
    """
    left, rows = list(range(len(needs))), []
    for _ in range(num_rows):
        row = left[:1]
        if row:
            length, images = needs[row[0]]
            window = sorted(left[1 : WINDOW + 1], key=lambda sample: -needs[sample][0])
            row += _best_subset(window, needs, capacity - length, max_images - images)
            left = [sample for sample in left[: WINDOW + 1] if sample not in row] + left[WINDOW + 1 :]
        rows.append(row)
    return None if left else rows


def _best_subset(samples: list[int], needs: list[list[int]], room: int, max_images: int) -> list[int]:
    """Of `samples` some that fill `room` best, the first ones rather than the last. Their images are counted
    only if there turn out to be too many."""
    chosen = _best_sum([(sample, needs[sample][0]) for sample in samples], room, 1, room + 1)
    if sum(needs[sample][1] for sample in chosen) <= max_images:
        return chosen
    stride = 2 * room + 1  # a sum of two lengths stays below
    found = [(sample, needs[sample][1] * stride + needs[sample][0]) for sample in samples]
    found = [pair for pair in found if needs[pair[0]][0] <= room and needs[pair[0]][1] <= max_images]
    return _best_sum(found, room, max_images + 1, stride)


def _best_sum(samples: list[tuple[int, int]], room: int, layers: int, stride: int) -> list[int]:
    """Those of the samples (number, size) whose sizes have a sum as near to `room` as can be, where
    multiples of `stride` below `layers` times that are not counted.

    Bit s of `sums` says that some of the samples so far have the sum s, so one shift adds a sample to all.
    """
    every = sum(1 << (layer * stride) for layer in range(layers))
    within, full = every * ((1 << (room + 1)) - 1), every << room
    sums, steps = 1, []
    for sample, size in samples:
        more = (sums | sums << size) & within if size <= within.bit_length() else sums
        if more != sums:
            steps.append((sample, size, sums))
            sums = more
            if sums & full:
                break
    tops = [(sums >> (layer * stride) & ((1 << (room + 1)) - 1)).bit_length() - 1 for layer in range(layers)]
    best = max(range(layers), key=tops.__getitem__)
    target, chosen = best * stride + tops[best], []
    for sample, size, before in reversed(steps):
        if not before >> target & 1:
            chosen.append(sample)
            target -= size
    return chosen


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

    def take(self, rows: list[list[int]], needs: list[list[int]]) -> None:
        """Put samples into the rows that are given, which are empty."""
        self.samples = rows
        self._images_left = [
            left - sum(needs[sample][1] for sample in row)
            for left, row in zip(self._images_left, rows, strict=True)
        ]
        self._room = sorted(
            (left - sum(needs[sample][0] for sample in rows[row]), row) for left, row in self._room
        )

    def extend(self, needs: list[list[int]], start: int) -> int:
        """Add the samples from `start` on up to the first that does not fit; its number."""
        while self.add(start, *needs[start]):
            start += 1
        return start
