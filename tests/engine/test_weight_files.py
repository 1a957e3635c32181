"""Weights written one tensor at a time: files that every loader of the format takes for its own."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megamm.engine import weight_files
from megamm.engine.manifest import UntrustedCheckpoint, hash_file
from megamm.engine.restricted import read_index
from megamm.engine.weight_files import StreamedTensor, WeightFiles, whole_tensors, write_streamed

TENSORS = {
    "matrix": torch.randn(7, 5),
    "half": torch.randn(3, 4, 2).half(),
    "bf16": torch.randn(129).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "large": torch.randn(1500, 1000),
    "optimizer.state.exp_avg.matrix": torch.randn(7, 5),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def test_any_loader_reads_them(directory: Path) -> None:
    written = write_streamed(whole_tensors(TENSORS), directory)
    assert len(written) > 1 and {path.name for path in written} == {
        p.name for p in directory.glob("*.distcp")
    }
    assert all(hash_file(path) == entry for path, entry in written.items())
    loaded = {name: torch.empty_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    for place, info in read_index(directory).storage_data.items():  # each item by itself, too
        raw = (directory / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        tensor = torch.load(io.BytesIO(raw), weights_only=True)
        assert torch.equal(tensor, TENSORS[place.fqn]) and info.offset % 64 == 0


def test_reading_leaves_the_optimizer_out(directory: Path) -> None:
    write_streamed(whole_tensors(TENSORS), directory)
    found = WeightFiles(directory)
    assert set(found) == {name for name in TENSORS if not name.startswith("optimizer.")}
    for name in found:
        assert torch.equal(found[name], TENSORS[name])
        assert (found.shape(name), found.dtype(name)) == (tuple(TENSORS[name].shape), TENSORS[name].dtype)


def test_tensors_are_made_when_they_are_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one tensor at a time are alive, on each thread."""
    monkeypatch.setattr(weight_files, "THREADS", 1)
    log: list[str] = []

    def tensor(name: str) -> StreamedTensor:
        def pieces() -> list[torch.Tensor]:
            log.append(name)
            return [torch.full((2, 3), float(i)) for i in range(2)]

        return StreamedTensor(name, torch.float32, (4, 3), pieces)

    names = [f"t{i}" for i in range(6)]
    write_streamed((tensor(name) for name in names), directory)
    assert log == names
    assert torch.equal(WeightFiles(directory)["t5"], torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2))


def test_pieces_must_make_up_the_tensor(directory: Path) -> None:
    short = StreamedTensor("x", torch.float32, (4, 3), lambda: [torch.zeros(3, 3)])
    with pytest.raises(AssertionError, match="x: its pieces do not make up"):
        write_streamed([short], directory)


def test_an_index_that_lies_is_noticed(directory: Path) -> None:
    write_streamed(whole_tensors({"a": torch.ones(4), "b": torch.ones(2)}), directory)
    found = WeightFiles(directory)
    places = found._places
    key_a, key_b = (next(key for key in places if key[0] == name) for name in "ab")
    places[key_a], places[key_b] = places[key_b], places[key_a]
    with pytest.raises(UntrustedCheckpoint, match="something else for a than its index says"):
        found["a"]
