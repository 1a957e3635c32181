"""Curves are thinned out without losing what matters, and axes fit what they show."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megamm.pages.axis import ticks
from megamm.report.chart import Chart, Line, _extent, _path, short
from megamm.report.curves import Curves, make_buckets, points, read_curves
from tests.report.runs import row, write_rows


@pytest.mark.parametrize("count", [1, 7, 480, 481, 1001, 5000])
def test_buckets_cover_every_step_once(count: int) -> None:
    steps = np.arange(3, 3 + count)
    buckets = make_buckets(steps)
    assert len(buckets.starts) == min(count, 480)
    covered = [step for a, b in zip(buckets.first, buckets.last, strict=True) for step in range(a, b + 1)]
    assert covered == steps.tolist()
    sizes = buckets.last - buckets.first + 1
    assert sizes.max() - sizes.min() <= 1


def test_points_of_a_bucket() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan, np.inf, np.nan, 9.0, 5.0, 1.0])
    found = points(values, make_buckets(np.arange(1, 10), limit=3))
    np.testing.assert_array_equal(found.mean, [2.0, np.nan, 5.0])
    np.testing.assert_array_equal(found.low, [1.0, np.nan, 1.0])
    np.testing.assert_array_equal(found.high, [3.0, np.nan, 9.0])


def test_counters_that_began_anew(tmp_path: Path) -> None:
    write_rows(
        tmp_path / "m", [row(n, skipped_samples=count) for n, count in enumerate([1, 4, 4, 0, 2, 3], start=1)]
    )
    assert read_curves(tmp_path / "m", 20).total("skipped_samples") == 4 + 3


def test_lines_stop_where_nothing_is_known() -> None:
    x = np.arange(6.0)
    path = _path(x, np.array([1, 2, np.nan, 4, np.nan, np.nan]))
    assert path == "M0.0 1.0L1.0 2.0M3.0 4.0h0"


@pytest.mark.parametrize(
    ("values", "from_zero", "is_cut"),
    [
        ([3.0], False, False),
        ([0.0, 0.0], True, False),
        ([-1.0, 2.0], True, False),
        ([2.0] * 999 + [100.0], True, True),
        ([2.0] * 9 + [100.0], True, False),
        ([math.nan], True, False),
        (list(np.linspace(2, 6, 100)), False, False),
    ],
)
def test_axes_fit(values: list[float], from_zero: bool, is_cut: bool) -> None:
    array = np.array(values)
    low, high, cut = _extent(
        Chart("x", [Line("", "v")], from_zero=from_zero), Curves(np.arange(len(array)), {"v": array})
    )
    assert cut == is_cut and low < high
    if is_cut:
        assert 2 < high < 10
    elif np.isfinite(array).all():
        assert low <= array.min() and array.max() <= high
        assert low == min(0, array.min()) or not from_zero


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 2e-5, [0, 5e-6, 1e-5, 1.5e-5, 2e-5]),
        (0, 200_000, [0, 50_000, 100_000, 150_000, 200_000]),
        (1.9, 2.1, [1.9, 1.95, 2.0, 2.05, 2.1]),
    ],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 4) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0"), (3.15e-8, "3.15e-8"), (2e-5, "2e-5"), (0.857, "0.857"), (1234, "1,234"), (-0.5, "-0.5")],
        *[(167300, "167.3k"), (200_000, "200k"), (104.9e9, "104.9B"), (6e7, "60M"), (math.nan, "–")],
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text
