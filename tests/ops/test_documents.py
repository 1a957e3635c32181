"""Samples in rows: the operators against the rule in numpy, which tests/data/test_assemble.py spells out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm import ops
from megamm.ops import documents as operators
from megamm.ops.documents import Image, Sizes, Stretches, as_tensor

IMAGE, PAD = 3, 0
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
PAIRS = {
    "sizes": (operators.document_sizes, operators.document_sizes_ref),
    "rows": (operators.fill_rows, operators.fill_rows_ref),
    "gather": (operators.gather_documents, operators.gather_documents_ref),
}
both = pytest.mark.parametrize("which", [0, 1], ids=["public", "reference"])


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@st.composite
def documents(draw: st.DrawFn) -> tuple[Stretches, torch.Tensor, torch.Tensor, Image]:
    """Stretches anywhere in flat arrays, overlapping and out of order too; images are frequent, at the ends
    as well; places from one position to more than enough."""
    size = draw(st.integers(1, 90))
    ids = draw(st.lists(st.sampled_from([1, IMAGE, 4, 5, 60000]), min_size=size, max_size=size))
    flags = draw(st.lists(st.sampled_from([0, 0, 1, 255]), min_size=size, max_size=size))
    starts = draw(st.lists(st.integers(0, size - 1), max_size=6))
    ends = [draw(st.integers(start + 1, size)) for start in starts]
    count, dtype = len(starts), draw(st.sampled_from([np.uint16, np.int32]))
    stretches = Stretches(
        torch.from_numpy(np.array(ids, dtype)),
        torch.from_numpy(np.array(flags, np.uint8)),
        longs(*starts),
        longs(*ends),
    )
    places = longs(*draw(st.lists(st.integers(1, 120), min_size=count, max_size=count)))
    images = longs(*draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    image = Image(
        draw(st.sampled_from([IMAGE, IMAGE, IMAGE, -1, 1 << 16, 1 << 40])), draw(st.integers(1, 40))
    )
    return stretches, places, images, image


@fused
@given(drawn=documents(), random=st.randoms(use_true_random=False), restart=st.booleans())
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_same_as_the_rule(drawn: Any, random: Any, restart: bool) -> None:
    samples, places, images, image = drawn
    sizes = operators.document_sizes_ref(samples, places, images, image)
    found = operators.document_sizes(samples, places, images, image)
    assert found.table.dtype == torch.int64 and torch.equal(found.table, sizes.table)
    num_rows = random.randint(1, 4)
    rows = sorted(random.randrange(num_rows) for _ in places)
    needs = [
        sum(n for n, r in zip(sizes.positions.tolist(), rows, strict=True) if r == i) for i in range(num_rows)
    ]
    length = max(needs) + random.randint(0, 5)
    arguments = (samples, sizes, longs(*rows), num_rows, length, image, PAD, restart)
    for name, got, want in zip(
        ("input_ids", "labels", "position_ids"),
        operators.fill_rows(*arguments),
        operators.fill_rows_ref(*arguments),
        strict=True,
    ):
        assert got.dtype == torch.int64 and torch.equal(got, want), name
    for array in samples[:2]:
        flat, lengths = operators.gather_documents(array, samples.starts, samples.ends)
        wanted = operators.gather_documents_ref(array, samples.starts, samples.ends)
        assert flat.dtype == array.dtype
        assert [flat.tolist(), lengths.tolist()] == [x.tolist() for x in wanted]


def many(count: int = 300) -> tuple[Stretches, torch.Tensor, torch.Tensor, Image]:
    """Long samples, so many that threads share them."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 500, 200_000).astype(np.uint16)
    starts = draw.integers(0, 190_000, count)
    stretches = Stretches(
        torch.from_numpy(tokens),
        torch.from_numpy(draw.integers(0, 2, 200_000).astype(np.uint8)),
        torch.from_numpy(starts),
        torch.from_numpy(starts + draw.integers(1, 9000, count)),
    )
    return stretches, longs(*[6000] * count), longs(*[30] * count), Image(IMAGE, 17)


@fused
def test_the_same_with_any_number_of_threads() -> None:
    samples, places, images, image = many()
    sizes = operators.document_sizes_ref(samples, places, images, image)
    rows = torch.arange(len(places)) // 3
    arguments = (samples, sizes, rows, 100, 18_010, image, PAD, True)
    wanted = operators.fill_rows_ref(*arguments)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found = operators.document_sizes(samples, places, images, image)
            assert torch.equal(found.table, sizes.table)
            assert all(map(torch.equal, operators.fill_rows(*arguments), wanted))
            flat, _ = operators.gather_documents(samples.tokens, samples.starts, samples.ends)
            pieces = zip(samples.starts.tolist(), samples.ends.tolist(), strict=True)
            want = np.concatenate([samples.tokens.numpy()[start:end] for start, end in pieces])
            assert np.array_equal(flat.numpy(), want)
    finally:
        torch.set_num_threads(threads)


def sizes_of(*positions: int) -> Sizes:
    """Of documents without images."""
    table = torch.zeros(5, len(positions), dtype=torch.int64)
    table[0] = longs(*positions)
    return Sizes(table)


def good() -> dict[str, Any]:
    """Arguments that fill two rows."""
    tokens = torch.arange(10, 22, dtype=torch.int32)
    samples = Stretches(tokens, torch.ones(12, dtype=torch.uint8), longs(0, 4), longs(4, 12))
    sizes = sizes_of(4, 6)
    return {"samples": samples, "sizes": sizes, "rows": longs(0, 1), "num_rows": 2, "length": 7}


def fill(which: int, **changes: Any) -> tuple[torch.Tensor, ...]:
    arguments = good() | changes
    found: tuple[torch.Tensor, ...] = PAIRS["rows"][which](
        **arguments, image=Image(3, 4), pad_id=0, restart=True
    )
    return found


@both
@pytest.mark.parametrize(
    ("starts", "ends"),
    [
        ([-1, 4], [4, 12]),
        ([0, 4], [4, 13]),
        ([0, 4], [0, 12]),
        ([5, 4], [4, 12]),
        ([0, 2**62], [4, 2**62 + 1]),
    ],
)
def test_nothing_outside_is_read(which: int, starts: list[int], ends: list[int]) -> None:
    samples = good()["samples"]._replace(starts=longs(*starts), ends=longs(*ends))
    with pytest.raises(IndexError, match="array of 12"):
        fill(which, samples=samples)
    with pytest.raises(IndexError, match="array of 12"):
        PAIRS["sizes"][which](samples, longs(9, 9), longs(1, 1), Image(3, 4))
    if ends[0]:  # gathering an empty one is no fault
        with pytest.raises(IndexError, match="array of 12"):
            PAIRS["gather"][which](samples.tokens, samples.starts, samples.ends)


@both
def test_nothing_outside_is_written(which: int) -> None:
    assert fill(which)[0].tolist() == [[10, 11, 12, 13, 0, 0, 0], [14, 15, 16, 17, 18, 19, 0]]
    for rows in ([1, 0], [0, 2], [-1, 0]):
        with pytest.raises(IndexError, match="row"):
            fill(which, rows=longs(*rows))
    for changes in ({"rows": longs(0, 0)}, {"length": 5}, {"num_rows": 2, "length": -1}):
        with pytest.raises(ValueError, match=r"row|negative"):
            fill(which, **changes)
    for positions in ((0, 6), (-3, 6), (4, 2**62), (2**63 - 1, 6)):
        with pytest.raises(ValueError, match="row"):
            fill(which, sizes=sizes_of(*positions))
    with pytest.raises(ValueError, match="more positions than its sample"):
        fill(which, sizes=sizes_of(5, 6))


@both
def test_bad_arguments_are_refused(which: int) -> None:
    samples, two = good()["samples"], longs(9, 9)
    sizes = PAIRS["sizes"][which]
    for changes in (
        {"tokens": samples.tokens.long()},
        {"tokens": samples.tokens.reshape(3, 4)},
        {"learnt": samples.learnt.int()},
        {"learnt": samples.learnt[1:]},
        {"ends": samples.ends.int()},
        {"ends": samples.ends[:1]},
    ):
        with pytest.raises(ValueError, match="expected"):
            sizes(samples._replace(**changes), two, two, Image(3, 4))
    for limits in ((longs(0, 9), two), (two, longs(0, -1)), (two[:1], two), (two, two.int())):
        with pytest.raises(ValueError, match=r"expected|position"):
            sizes(samples, *limits, Image(3, 4))
    for table in (torch.zeros(4, 2, dtype=torch.int64), torch.ones(5, 2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected"):
            fill(which, sizes=Sizes(table))
    with pytest.raises(ValueError, match="0 positions of an image"):
        sizes(samples, two, two, Image(3, 0))
    with pytest.raises(ValueError, match="expected"):
        PAIRS["gather"][which](samples.tokens.reshape(3, 4), samples.starts, samples.ends)


@both
def test_no_documents(which: int) -> None:
    none = good()["samples"]._replace(starts=longs(), ends=longs())
    assert PAIRS["sizes"][which](none, longs(), longs(), Image(3, 4)).table.shape == (5, 0)
    found = fill(which, samples=none, sizes=sizes_of(), rows=longs())
    assert found[0].tolist() == [[0] * 7] * 2 and found[2].tolist() == [list(range(7))] * 2
    assert [len(x) for x in PAIRS["gather"][which](none.tokens, longs(), longs())] == [0, 0]


@both
def test_mapped_files(which: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """That may be read alone, without a warning and without a copy."""
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", np.uint16, "r")
    tensor = as_tensor(mapped)
    assert tensor.data_ptr() == mapped.__array_interface__["data"][0]
    found, lengths = PAIRS["gather"][which](tensor, longs(40, 3, 3), longs(50, 3, 5))
    assert found.tolist() == [*range(40, 50), 3, 4] and lengths.tolist() == [10, 0, 2]
    assert [w for w in recwarn if "writ" in str(w.message)] == []


@fused
@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("document_sizes", lambda s: (*s, longs(9, 9), longs(1, 1), 4, 3)),
        ("fill_rows", lambda s: (*s, *sizes_of(4, 6), longs(0, 1), 2, 7, 4, 3, 0, True)),
        ("gather_documents", lambda s: (s.tokens, s.starts, s.ends)),
    ],
)
def test_schemas(operator: str, arguments: Callable[[Stretches], tuple[Any, ...]]) -> None:
    torch.library.opcheck(
        getattr(torch.ops.megamm, operator).default, arguments(good()["samples"]), test_utils="test_schema"
    )
