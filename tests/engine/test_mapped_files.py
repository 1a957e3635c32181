"""Tensors of files: where they lie is known without reading, and reading takes no memory that stays."""

from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.engine.mapped_files import (
    Extent,
    MappedFile,
    UntrustedPickle,
    blocks,
    give_back,
    unpickled_extents,
)


def saved(content: Any, path: Path) -> MappedFile:
    torch.save(content, path)
    return MappedFile(path)


def test_pickled_tensors_are_found_without_being_read(tmp_path: Path) -> None:
    base = torch.randn(10, 7)
    tensors = {
        "plain": torch.randn(5, 3),
        "shared": base,
        "strided": base[2:4].t(),
        "parameter": torch.nn.Parameter(torch.randn(3).bfloat16()),
        "empty": torch.randn(0, 3),
        "scalar": torch.tensor(3.0),
        "ids": torch.arange(5),
    }
    file = saved({"deep": {"list": [tensors]}, "step": 3}, tmp_path / "a.pt")
    found = unpickled_extents(file, 0, file.size)
    assert found["step"] == 3
    (extents,) = found["deep"]["list"]
    assert extents.keys() == tensors.keys()
    for name, tensor in tensors.items():
        extent = extents[name]
        assert (extent.dtype, extent.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(file.tensor(extent), tensor.detach()), name


def test_a_part_of_a_file_is_a_file(tmp_path: Path) -> None:
    """As sharded files are made: archives one behind the other, at any place."""
    tensors = [torch.randn(n) for n in (3, 100, 1)]
    places = []
    with (tmp_path / "all").open("wb") as out:
        out.write(b"xyz")
        for tensor in tensors:
            torch.save(tensor, tmp_path / "one")
            places.append((out.tell(), (tmp_path / "one").stat().st_size))
            out.write((tmp_path / "one").read_bytes())
    file = MappedFile(tmp_path / "all")
    for tensor, (offset, length) in zip(tensors, places, strict=True):
        assert torch.equal(file.tensor(unpickled_extents(file, offset, length)), tensor)


@pytest.mark.parametrize("content", [b"x", b"PK\x03\x04" + bytes(100), pickle.dumps({"a": 1})])
def test_what_torch_did_not_write_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    file = MappedFile(tmp_path / "a.pt")
    with pytest.raises(ValueError):
        unpickled_extents(file, 0, file.size)


def test_old_formats_and_code_are_not_read(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    file = MappedFile(tmp_path / "old.pt")
    with pytest.raises(UntrustedPickle, match=r"since release 1\.6"):
        unpickled_extents(file, 0, file.size)
    file = saved({"a": torch.ones(2), "b": Fraction(1, 2)}, tmp_path / "code.pt")
    with pytest.raises(UntrustedPickle, match=r"holds fractions\.Fraction"):
        unpickled_extents(file, 0, file.size)


def test_extents_beyond_the_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(64))
    file = MappedFile(tmp_path / "a")
    whole = Extent(0, torch.float32, (4, 4), (4, 1))
    assert file.tensor(whole).shape == (4, 4)
    for wrong in (
        Extent(1, torch.float32, (4, 4), (4, 1)),
        Extent(-4, torch.float32, (4,), (1,)),
        Extent(0, torch.float32, (4, 4), (5, 1)),
        Extent(0, torch.float32, (2,), (-1,)),
        Extent(0, torch.float32, (2**40,), (1,)),
    ):
        with pytest.raises(ValueError, match="beyond"):
            file.tensor(wrong)


def resident() -> int:
    """Bytes of mapped files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_looking_at_a_file_takes_no_memory_that_stays(tmp_path: Path) -> None:
    size = 64 << 20
    content = torch.randint(0, 256, (size,), dtype=torch.uint8)
    content.numpy().tofile(tmp_path / "a")
    file = MappedFile(tmp_path / "a")
    # not aligned to anything
    tensor = file.tensor(Extent(2, torch.bfloat16, (size // 2 - 1,), (1,)))
    before, most, joined = resident(), 0, []
    for block in blocks(tensor):
        joined.append(bytes(block))
        most = max(most, resident())
    assert b"".join(joined) == content[2:].numpy().tobytes()
    assert most - before < 8 << 20 and resident() - before < 2 << 20
    assert int(tensor.view(torch.uint8).sum()) == int(content[2:].sum())  # it can be looked at again
    assert resident() - before > size // 2
    give_back(tensor)
    assert resident() - before < 2 << 20


def test_other_memory_is_left_alone() -> None:
    """Of memory that is no map, pages given back would come back as zeros."""
    tensor = torch.randn(1 << 20)
    copy = tensor.clone()
    joined = b"".join(bytes(block) for block in blocks(tensor))
    give_back(tensor)
    assert torch.equal(tensor, copy) and joined == copy.numpy().tobytes()
    assert list(blocks(torch.empty(0, 3))) == []
    assert (
        b"".join(blocks(tensor.view(1024, -1).t()[:2]))
        == copy.view(1024, -1).t()[:2].contiguous().numpy().tobytes()
    )
