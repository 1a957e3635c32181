"""Checksums of rows: the operator and its fallback against zlib."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from megamm import ops
from megamm.ops.crc32 import Part, crc32_rows, crc32_rows_ref

both = pytest.mark.parametrize("operator", [crc32_rows, crc32_rows_ref])
Operator = Callable[[Sequence[Part], torch.Tensor], torch.Tensor]


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@both
def test_every_length_and_alignment(operator: Operator) -> None:
    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    lengths = [*range(300), 511, 512, 513, 1000, 4000]
    starts = np.arange(len(lengths)) % 17
    ends, seeds = starts + lengths, np.arange(len(lengths)) * 2654435761  # beyond 32 bits
    part = Part(torch.from_numpy(data), torch.from_numpy(starts), torch.from_numpy(ends))
    wanted = [
        zlib.crc32(data[start:end], int(seed) & 0xFFFFFFFF)
        for start, end, seed in zip(starts, ends, seeds, strict=True)
    ]
    assert operator([part], torch.from_numpy(seeds)).tolist() == wanted


@both
def test_several_parts_of_different_types(operator: Operator) -> None:
    draw = np.random.default_rng(1)
    tokens, flags = draw.integers(0, 60000, 900).astype(np.uint16), draw.integers(0, 2, 900).astype(np.uint8)
    records = draw.integers(0, 256, (40, 48)).astype(np.uint8)
    starts, ends = longs(0, 100, 100, 899), longs(100, 100, 700, 900)
    first, last = longs(0, 3, 3, 40), longs(3, 3, 40, 40)
    parts = [Part(torch.from_numpy(x), starts, ends) for x in (tokens, flags)]
    parts.append(Part(torch.from_numpy(records), first, last))
    found = operator(parts, longs(0, 1, 2, -1))
    for row in range(4):
        piece, images = slice(int(starts[row]), int(ends[row])), slice(int(first[row]), int(last[row]))
        value = zlib.crc32(tokens[piece].tobytes(), (0, 1, 2, 0xFFFFFFFF)[row])
        value = zlib.crc32(records[images].tobytes(), zlib.crc32(flags[piece].tobytes(), value))
        assert int(found[row]) == value
    assert found.dtype == torch.int64
    assert operator([], longs(5, 2**32 + 6)).tolist() == [5, 6]
    nothing = Part(torch.empty(0, 48, dtype=torch.uint8), longs(0, 0), longs(0, 0))
    assert operator([nothing], longs(5, 6)).tolist() == [5, 6]


@pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
def test_the_same_with_any_number_of_threads() -> None:
    data = torch.randint(0, 256, (4_000_000,), dtype=torch.uint8)
    starts = torch.arange(0, 4_000_000, 1000)
    part, seeds = Part(data, starts, starts + 1000), torch.arange(len(starts))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = crc32_rows([part], seeds)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, crc32_rows_ref([part], seeds))


@both
@pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, 11), (11, 11), (2**62, 2**62 + 1)])
def test_nothing_outside_is_read(operator: Operator, start: int, end: int) -> None:
    part = Part(torch.zeros(10, 2, dtype=torch.int32), longs(0, start), longs(10, end))
    with pytest.raises(IndexError, match="array of 10"):
        operator([part], longs(0, 0))


@both
def test_bad_arguments_are_refused(operator: Operator) -> None:
    array, one = torch.zeros(10, dtype=torch.uint8), longs(0)
    for parts in (
        [Part(array, longs(0, 0), longs(0, 0))],
        [Part(array, one.int(), one)],
        [Part(array[::2], one, one)],
        [Part(array.reshape(2, 5).T, one, one)],
    ):
        with pytest.raises(ValueError, match="expected"):
            operator(parts, one)
