"""Micro-batches of equal cost: who computes which sample, so that nobody waits long for the others."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNIT = 1024  # costs are whole numbers of 1/UNIT positions: their sums are the same on every machine
PARTNERS = 64  # cheapest rows with which the dearest one tries to exchange a sample


@dataclass(frozen=True)
class Cost:
    """What a sample costs beside its positions, of which all micro-batches compute the same number.

    Attributes:
        image: encoding an image, in positions of the language model without attention.
        attention: of one position to one other, in the same unit.
        window: positions attend to at most this many before them; None: to all.
    """

    image: float = 1.0
    attention: float = 0.0
    window: int | None = None

    def of(self, lengths: np.ndarray, images: np.ndarray) -> np.ndarray:
        """[n] int64 costs in 1/UNIT positions of samples of `lengths` [n] positions and `images` [n]."""
        near = lengths if self.window is None else np.minimum(lengths, self.window)
        seen = near * (lengths - near / 2)  # each position attends to those before it
        return np.rint(UNIT * (self.attention * seen + self.image * images)).astype(np.int64)


def deal(costs: Sequence[int], num_bins: int) -> list[list[int]]:
    """Deal items over bins of equally many items and about equal cost.

    The dearest item that is left goes to the cheapest bin that is not full (LPT of Graham, "Bounds on
    multiprocessing timing anomalies", 1969, with a limit on the number). Of equal ones the first counts,
    so items of equal cost are dealt in turn.

    Args:
        costs: of the items, a multiple of `num_bins` in number.
    Returns:
        The items of each bin, ascending.
    """
    size = len(costs) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    cheapest = [(0, 0, number) for number in range(num_bins)]  # cost, items, bin
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        total, count, number = heapq.heappop(cheapest)
        bins[number].append(item)
        if count + 1 < size:
            heapq.heappush(cheapest, (total + costs[item], count + 1, number))
    return [sorted(items) for items in bins]


def even_out(
    rows: Sequence[Sequence[int]],
    costs: np.ndarray,
    lengths: np.ndarray,
    images: np.ndarray,
    capacity: int,
    max_images: int,
) -> list[list[int]]:
    """Exchange samples between packed rows until the dearest row finds no exchange that makes it cheaper. (It
    never gives its last sample for nothing, because the other row would then be as dear.)

    Args:
        rows: the samples in each.
        costs, lengths, images: [n], of the samples.
        capacity, max_images: of each row; they stay kept.
    Returns:
        Rows of the same samples, ascending within a row; none is empty.
    """
    # a last column for "no sample", which makes an exchange a move
    needs = np.array([[*costs, 0], [*lengths, 0], [*images, 0]], np.int64)
    limits = np.array([capacity, max_images])
    none = needs.shape[1] - 1
    members = [np.array([*row, none]) for row in rows]
    totals = [needs[:, row].sum(axis=1) for row in members]
    for _ in range(2 * len(rows)):
        by_cost = sorted(range(len(rows)), key=lambda row: int(totals[row][0]))
        dear = by_cost[-1]
        for cheap in by_cost[: min(PARTNERS, len(rows) - 1)]:
            pair = _best_exchange(
                needs[:, members[dear]], needs[:, members[cheap]], totals[dear], totals[cheap], limits
            )
            if pair is not None:
                given, taken = members[dear][pair[0]], members[cheap][pair[1]]
                members[dear][pair[0]], members[cheap][pair[1]] = taken, given
                for row in (dear, cheap):
                    members[row] = np.array([*sorted(set(members[row].tolist()) - {none}), none])
                    totals[row] = needs[:, members[row]].sum(axis=1)
                break
        else:
            break
    return [row[:-1].tolist() for row in members]


def _best_exchange(
    dear: np.ndarray, cheap: np.ndarray, dear_total: np.ndarray, cheap_total: np.ndarray, limits: np.ndarray
) -> tuple[int, int] | None:
    """Which sample of the dear row (columns of cost, length, images) to give for which of the cheap one, so
    that the dearer of the two gets as cheap as possible; None: no exchange helps and fits."""
    change = dear[:, :, None] - cheap[:, None, :]
    after_dear, after_cheap = dear_total[:, None, None] - change, cheap_total[:, None, None] + change
    dearer = np.maximum(after_dear[0], after_cheap[0])
    fits = (after_dear[1:] <= limits[:, None, None]).all(axis=0)
    fits &= (after_cheap[1:] <= limits[:, None, None]).all(axis=0)
    dearer = np.where(fits, dearer, np.iinfo(np.int64).max)
    best = int(dearer.argmin())
    if dearer.flat[best] >= dear_total[0]:
        return None
    return divmod(best, dearer.shape[1])
