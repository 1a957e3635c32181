"""Every source has its share: exactly in a cycle, nearly in every prefix, found without a history."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data import apportion
from megamm.data.apportion import Apportionment

SHARES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def of(counts: list[int]) -> Apportionment:
    return Apportionment([Fraction(count) for count in counts])


@settings(max_examples=120, deadline=None)
@given(counts=SHARES, start=st.integers(0, 10**15), size=st.integers(0, 70))
def test_any_window_of_a_cycle_is_exact(counts: list[int], start: int, size: int) -> None:
    shares = of(counts)
    assert [count * math.gcd(*counts) for count in shares.counts] == counts
    sources, before = shares.at(start, shares.cycle)
    assert np.bincount(sources, minlength=len(counts)).tolist() == shares.counts
    # a source's own numbers go on where they were, in blocks of any size
    later, after = shares.at(start + size, 5)
    cut = np.concatenate([sources, shares.at(start + shares.cycle, size + 5)[0]])
    assert np.array_equal(later, cut[size : size + 5])
    counted = np.bincount(cut[:size], minlength=len(counts))
    assert [then - now for now, then in zip(before, after, strict=True)] == counted.tolist()


@settings(max_examples=60, deadline=None)
@given(counts=SHARES)
def test_every_prefix_is_near_the_ideal(counts: list[int]) -> None:
    shares = of(counts)
    sources, before = shares.at(0, 2 * shares.cycle)
    assert before == [0] * len(counts)
    depth = math.ceil(math.log2(len(counts)))
    used = np.cumsum(sources[:, None] == np.arange(len(counts)), axis=0)
    ideal = np.arange(1, len(sources) + 1)[:, None] * np.array(shares.counts) / shares.cycle
    assert (abs(used - ideal) < max(depth, 1e-9)).all()


@pytest.mark.parametrize("limit", [1 << 31, 1])
def test_long_runs_and_large_shares(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of hundreds of millions of samples, after 10^17 of them; the two kinds of numbers agree."""
    sizes = [558_128_117, 300_000_007, 665_298, 11]
    monkeypatch.setattr(apportion, "INT64_CYCLE", limit)
    shares = of(sizes)
    assert shares.counts == sizes
    start = 10**17 + 12345
    sources, before = shares.at(start, 4000)
    for size, used, here in zip(sizes, before, np.bincount(sources, minlength=4), strict=True):
        assert abs(used - Fraction(start * size, sum(sizes))) < 2
        assert abs(here - 4000 * size / sum(sizes)) < 4
    monkeypatch.setattr(apportion, "INT64_CYCLE", 1 << 31)
    assert np.array_equal(of(sizes).at(start, 4000)[0], sources) and of(sizes).at(start, 1)[1] == before


def test_fractions_are_kept() -> None:
    shares = Apportionment([Fraction("0.1"), Fraction("0.2"), Fraction(1, 3)])
    assert shares.counts == [3, 6, 10] and shares.cycle == 19
    huge = Apportionment([Fraction("0.3333333333333333"), Fraction(2, 3)])
    assert huge.cycle > 1 << 31
    start = 3 * 10**18 + huge.cycle // 2
    ends = [(start + i) * huge.counts[0] // huge.cycle for i in range(1001)]
    sources, before = huge.at(start, 1000)
    assert (sources == 0).tolist() == [b > a for a, b in pairwise(ends)]
    assert before == [ends[0], start - ends[0]]
