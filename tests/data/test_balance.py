"""Dealing and exchanging: nothing is lost, limits are kept, costs get equal."""

from __future__ import annotations

from itertools import chain

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data.balance import UNIT, Cost, deal, even_out
from megamm.data.packing import pack_prefix


@given(st.integers(1, 6), st.lists(st.integers(0, 50), min_size=6, max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_bins_are_equally_full_and_nearly_equally_dear(num_bins: int, costs: list[int]) -> None:
    costs = costs[: len(costs) // num_bins * num_bins]
    bins = deal(costs, num_bins)
    assert sorted(item for items in bins for item in items) == list(range(len(costs)))
    assert {len(items) for items in bins} == {len(costs) // num_bins}
    assert all(items == sorted(items) for items in bins)
    totals = [sum(costs[item] for item in items) for items in bins]
    assert max(totals) - min(totals) <= max(costs) * 2


def test_items_of_equal_cost_are_dealt_in_turn() -> None:
    for cost in (0, 7):
        assert deal([cost] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert deal([9, 1, 1, 1, 1, 9], 2) == [[0, 1, 3], [2, 4, 5]]


def test_costs_are_whole_numbers() -> None:
    lengths, images = np.array([1000, 100]), np.array([0, 2])
    found = Cost(image=5.5, attention=1e-4).of(lengths, images)
    assert found.dtype == np.int64
    assert found.tolist() == [50 * UNIT, round(11.5 * UNIT)]  # 1000^2 / 2 / 10^4; 100^2 / 2 / 10^4 + 2 * 5.5


def test_packed_rows_are_evened_out() -> None:
    """100 steps of 16 rows, samples of no to seven images: dearest row over the mean, before and after."""
    draw, cost = np.random.default_rng(0), Cost(image=20.0, attention=4e-5)
    before, after = [], []
    for _step in range(100):
        images = np.minimum(draw.geometric(0.35, 1000) - 1, 7)
        lengths = np.minimum(images + 10 + np.exp(draw.normal(5.8, 1.0, 1000)).astype(np.int64), 2048)
        packed = pack_prefix(lengths, images, 16, 2048, 16)
        costs = cost.of(lengths, images)
        evened = even_out(packed, costs, lengths, images, 2048, 16)
        assert sorted(chain.from_iterable(evened)) == sorted(chain.from_iterable(packed))
        assert all(row and row == sorted(row) for row in evened)
        assert max(lengths[row].sum() for row in evened) <= 2048
        assert max(images[row].sum() for row in evened) <= 16
        for rows, ratios in ((packed, before), (evened, after)):
            totals = [2048 * UNIT + int(costs[row].sum()) for row in rows]
            ratios.append(max(totals) / np.mean(totals))
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert np.mean(before) > 1.06 and np.mean(after) < 1.025, (np.mean(before), np.mean(after))


def test_nothing_to_exchange_leaves_the_rows() -> None:
    lengths, images = np.array([5, 5, 5, 5]), np.array([1, 1, 1, 1])
    rows = [[0, 3], [1, 2]]
    assert even_out(rows, Cost().of(lengths, images), lengths, images, 10, 2) == rows
    assert even_out([[0, 1]], Cost().of(lengths, images), lengths, images, 10, 2) == [[0, 1]]
