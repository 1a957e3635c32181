"""The order is a fresh permutation per epoch, a pure function, and even."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from megamm.data import order
from megamm.data.order import hashed, sample_at, samples_at, substitute_at

GOLDEN = [798, 987, 752, 536, 993, 867, 930, 273]
GOLDEN_HASH = 7586524058169547570


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 65, 1000, 4097, 100_003])
def test_every_epoch_is_a_permutation(size: int) -> None:
    rows = samples_at(7, "train", 0, 3 * size, size).reshape(3, size)
    for epoch in rows:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 64:
        assert not np.array_equal(rows[0], rows[1])


def test_blocks_and_single_samples_agree() -> None:
    """No state: any window, asked in any order, holds the same rows."""
    size = 37
    whole = samples_at(1, "a", 0, 200, size)
    for start in (0, 150, 36, 37, 38, 73, 5):
        assert np.array_equal(samples_at(1, "a", start, 50, size), whole[start : start + 50])
        assert sample_at(1, "a", start, size) == whole[start]
    assert len(samples_at(1, "a", 9, 0, size)) == 0


def test_many_epochs_are_permuted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed step takes hundreds of epochs of a small dataset."""
    calls: list[int] = []

    def counted(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
        calls.append(len(values))
        return feistel(values, keys, bits)

    feistel = order._feistel
    monkeypatch.setattr(order, "_feistel", counted)
    rows = samples_at(7, "train", 6, 3000, 3)
    assert (np.sort(rows.reshape(-1, 3)) == np.arange(3)).all()
    assert len(calls) < 40


def test_the_order_is_fixed_for_all_time() -> None:
    """These numbers may never change: runs in progress would see other samples after an update."""
    assert samples_at(1, "train", 0, 8, 1000).tolist() == GOLDEN
    assert hashed(1, "x") == GOLDEN_HASH


def test_seed_and_stage_matter() -> None:
    size = 500
    orders = {
        tuple(samples_at(seed, stage, 0, size, size)) for seed in (1, 2) for stage in ("align", "instruct")
    }
    assert len(orders) == 4


@pytest.mark.parametrize("size", [10**9 + 7, 2**40, 2**40 + 1, 2**62])
def test_large_sizes(size: int) -> None:
    start = 3 * size - 500
    rows = samples_at(3, "train", start, 1000, size)
    assert ((rows >= 0) & (rows < size)).all()
    assert len(set(rows[:500])) == len(set(rows[500:])) == 500
    assert rows.min() < size // 50 and rows.max() > size - size // 50


def test_rows_are_spread_evenly() -> None:
    size = 100_000
    rows = samples_at(11, "train", 0, size, size)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(rows, np.arange(size))[0, 1]) < 0.02
    first = np.histogram(rows[:10_000], bins=10, range=(0, size))[0]
    assert (abs(first - 1000) < 150).all()


def test_substitutes_are_pure_and_differ_by_attempt() -> None:
    drawn = [substitute_at(1, "train", 5, attempt, 10**6) for attempt in range(1, 20)]
    assert drawn == [substitute_at(1, "train", 5, attempt, 10**6) for attempt in range(1, 20)]
    assert len(set(drawn)) == len(drawn)


def test_impossible_requests() -> None:
    with pytest.raises(ValueError):
        sample_at(1, "train", 0, 0)
    with pytest.raises(ValueError):
        sample_at(1, "train", -1, 10)


def test_a_block_anywhere_in_hundreds_of_millions_costs_its_own_length() -> None:
    size = 300_000_007
    seen = []
    tracemalloc.start()
    for start in np.random.default_rng(0).integers(0, size - 4096, 40).tolist():
        rows = samples_at(9, "pairs", start, 4096, size)
        assert len(set(rows.tolist())) == 4096 and rows.min() >= 0 and rows.max() < size
        again = [sample_at(9, "pairs", start + i, size) for i in (0, 17, 4095)]
        assert again == rows[[0, 17, 4095]].tolist()
        seen.append((start, rows))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    pairs = {(start + i, int(row)) for start, rows in seen for i, row in enumerate(rows)}
    assert len({row for _, row in pairs}) == len({index for index, _ in pairs}), "one epoch, each once"
