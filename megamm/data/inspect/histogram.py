"""How often each value occurs: exact, in memory that grows with the different values alone.

Lengths of samples repeat: the different ones are at most the square root of twice the tokens, 1.4 million
in 10^12 tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PERCENTILES = (0, 1, 5, 25, 50, 75, 90, 95, 99, 100)


class Histogram:
    """Counts of values; those that are no whole numbers are kept in steps of `step`.

    Attributes:
        values: [n] int64, ascending, in units of `step`; counts: [n] int64.
    """

    def __init__(self, step: float = 1) -> None:
        self.step = step
        self.values, self.counts = np.empty(0, np.int64), np.empty(0, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count `values` ([n], of any number type)."""
        whole = values if self.step == 1 else np.rint(values / self.step)
        new, counts = np.unique(whole.astype(np.int64), return_counts=True)
        self.values, places = np.unique(np.concatenate([self.values, new]), return_inverse=True)
        total = np.zeros(len(self.values), np.int64)
        np.add.at(total, places, np.concatenate([self.counts, counts]))
        self.counts = total

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the values, 0 without any."""
        return float((self.values * self.counts).sum() / self.total) * self.step if self.total else 0.0

    def percentile(self, percent: float) -> float:
        """The smallest value that at least `percent` of all values do not exceed (nearest rank)."""
        if not self.total:
            return 0.0
        rank = max(1, -(-self.total * percent // 100))
        value = self.values[np.searchsorted(np.cumsum(self.counts), rank)]
        return int(value) if self.step == 1 else round(float(value * self.step), 6)

    def content(self) -> dict[str, Any]:
        """Count, mean and percentiles, for scripts."""
        percentiles = {str(percent): self.percentile(percent) for percent in PERCENTILES}
        return {"count": self.total, "mean": self.mean, "percentiles": percentiles}

    def bars(self, edges: np.ndarray) -> np.ndarray:
        """How many values lie in edges[i] <= value < edges[i + 1], the last edge included: [n] of [n + 1]."""
        counts, _ = np.histogram(self.values * self.step, bins=edges, weights=self.counts)
        return counts.astype(np.int64)
