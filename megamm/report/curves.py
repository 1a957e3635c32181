"""The numbers of metrics.jsonl as columns, and the few hundred points of them that a page can show."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamm.training.metrics import SmoothedLoss, read_metrics

COLUMNS = (
    *("loss", "lr", "grad_norm", "tokens_per_s", "tflops_per_device", "mfu", "hfu", "data_wait", "seconds"),
    *("consumed_samples", "num_tokens", "num_padding", "num_images", "skipped_samples", "skipped_steps"),
    "memory",
)
POINTS = 480  # of a curve at most


@dataclass(frozen=True)
class Curves:
    """One value for each logged step in every column; nan where a row has none.

    Attributes:
        steps: [N], rising.
        columns: COLUMNS and "loss_smoothed", each [N].
    """

    steps: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.steps)

    def last(self, name: str) -> float:
        """The value of the last step, nan if there is none."""
        return float(self.columns[name][-1]) if len(self) else np.nan

    def total(self, name: str) -> int:
        """What a counter has counted in all; it may have begun anew when the run was resumed."""
        values = np.nan_to_num(self.columns[name])
        return int(np.where(np.diff(values, prepend=0) < 0, values, np.diff(values, prepend=0)).sum())


def read_curves(path: Path, half_life: float) -> Curves:
    """The columns of a metrics.jsonl; the loss is smoothed with `half_life`, in steps."""
    steps, columns = array("q"), {name: array("d") for name in (*COLUMNS, "loss_smoothed")}
    smoothed = SmoothedLoss(half_life)
    for row in read_metrics(path):
        if steps and row["step"] <= steps[-1]:
            continue  # two processes wrote into the same directory
        steps.append(row["step"])
        for name in COLUMNS:
            columns[name].append(_number(row.get(name)))
        columns["loss_smoothed"].append(_number(smoothed.add(columns["loss"][-1])))
    found = {name: np.frombuffer(values, np.float64) for name, values in columns.items()}
    return Curves(np.frombuffer(steps, np.int64), found)


def _number(value: object) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else np.nan  # type: ignore[arg-type]


class Buckets(NamedTuple):
    """Steps that are shown as one point of a curve.

    Attributes:
        starts: index of the first row of each.
        first, last: its first and last step.
    """

    starts: np.ndarray
    first: np.ndarray
    last: np.ndarray


class Points(NamedTuple):
    """What a curve shows of each bucket; nan where it has no finite value."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def make_buckets(steps: np.ndarray, limit: int = POINTS) -> Buckets:
    """As many buckets as there are steps, or `limit` of about the same size."""
    count = min(len(steps), limit)
    bounds = np.linspace(0, len(steps), count + 1).round().astype(np.int64)
    return Buckets(bounds[:-1], steps[bounds[:-1]], steps[bounds[1:] - 1])


def points(values: np.ndarray, buckets: Buckets) -> Points:
    """Mean, least and greatest finite value of each bucket: no spike is lost."""
    good = np.isfinite(values)
    counts = np.add.reduceat(good, buckets.starts, dtype=np.int64)
    some = counts > 0
    sums = np.add.reduceat(np.where(good, values, 0.0), buckets.starts)
    low = np.minimum.reduceat(np.where(good, values, np.inf), buckets.starts)
    high = np.maximum.reduceat(np.where(good, values, -np.inf), buckets.starts)
    mean = np.clip(sums / np.maximum(counts, 1), low, high)  # which rounding may leave
    return Points(*(np.where(some, found, np.nan) for found in (mean, low, high)))
