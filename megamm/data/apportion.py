"""Which of several sources the i-th sample comes from, so that each has its share everywhere.

The sources are the leaves of a binary tree. Of the first i samples of a node, floor(i * left / both) go to
its left branch and the rest to the right one. Whether sample i goes left, and how many did before it, follow
from this number at i and i + 1: nothing is stored, and a random place costs as much as the next.

Every window of one cycle (as many samples as all shares together, without their common factor) holds every
source exactly as often as its share says. Any prefix is less than the depth of the tree, ceil(log2 of the
number of sources), away from the ideal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

INT64_CYCLE = 1 << 31  # of shorter cycles, the products of two numbers fit into 64 bits


class Apportionment:
    """Sources with fixed shares.

    Attributes:
        counts: samples of each source in one cycle, positive whole numbers.
        cycle: their sum.
    """

    def __init__(self, shares: Sequence[Fraction]) -> None:
        """
        Args:
            shares: of the sources, positive, of any sum.
        """
        denominator = math.lcm(*(share.denominator for share in shares))
        whole = [int(share * denominator) for share in shares]
        factor = math.gcd(*whole)
        self.counts = [number // factor for number in whole]
        self.cycle = sum(self.counts)

    def at(self, start: int, count: int) -> tuple[np.ndarray, list[int]]:
        """Where the samples start ... start + count - 1 come from.

        Returns:
            [count] int64 sources, and for each source how many samples came from it before `start`. Those
            that come from a source are consecutive in it.
        """
        # Python's integers where 64 bits might not do: slower, as exact
        kind = np.int64 if self.cycle < INT64_CYCLE else object
        sources = np.zeros(count, np.int64)
        before = [0] * len(self.counts)
        todo = [(range(len(self.counts)), np.arange(count), start)]
        while todo:
            leaves, places, first = todo.pop()
            if len(leaves) == 1:
                sources[places], before[leaves[0]] = leaves[0], first
                continue
            left, right = leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]
            in_left = sum(self.counts[leaf] for leaf in left)
            both = in_left + sum(self.counts[leaf] for leaf in right)
            cycles, rest = divmod(first, both)
            went_left = (rest + np.arange(len(places) + 1).astype(kind)) * in_left // both
            goes_left = (went_left[1:] > went_left[:-1]).astype(bool)
            left_before = cycles * in_left + int(went_left[0])
            todo.append((left, places[goes_left], left_before))
            todo.append((right, places[~goes_left], first - left_before))
        return sources, before
