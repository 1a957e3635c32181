"""Weights in and out of a checkpoint's sharded files, one tensor at a time, in one process.

The files are those of `sharded_files` (torch_dist format: every layout loads them), but written without a
state dict of the model and without process groups, and read as views of the files: the memory this takes does
not depend on the size of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from megamm.engine.archives import archive_around
from megamm.engine.hashed_file import HashedFile
from megamm.engine.manifest import DamagedCheckpoint, FileEntry, UntrustedCheckpoint
from megamm.engine.mapped_files import (
    Extent,
    MappedFile,
    UntrustedPickle,
    blocks,
    give_back,
    unpickled_extents,
)
from megamm.engine.restricted import read_index, untrusted
from megamm.engine.sharded_files import write_common

THREADS = min(4, os.cpu_count() or 1)
_MAX_FILE = 4 * 1000**3  # bytes, but a tensor is never split
_FILES_PER_THREAD = 4  # so that no thread ends much later than the others
_ALIGNMENT = 64
_NOT_OURS = "megamm has not written it so: use another checkpoint"


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made when it is written.

    Attributes:
        pieces: tensors whose numbers, one piece after another, are those of the tensor.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def whole_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterator[StreamedTensor]:
    """Tensors that are there already."""
    for name, tensor in tensors.items():
        yield StreamedTensor(name, tensor.dtype, tuple(tensor.shape), partial(tuple, (tensor,)))


# --- writing ------------------------------------------------------------------------------------------


def write_streamed(tensors: Iterable[StreamedTensor], directory: Path) -> dict[Path, FileEntry]:
    """Write whole tensors, so that every layout can load them.

    Args:
        tensors: in the order in which they are best read.
        directory: exists, and is empty.
    Returns:
        Size and hash of the files that hold them.
    Raises:
        OSError: the disk is full, ...
    """
    groups = _into_files(list(tensors))
    paths = [directory / f"__0_{number}.distcp" for number in range(len(groups))]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="convert") as pool:
        futures = [pool.submit(_write_file, *job) for job in zip(paths, groups, strict=True)]
        written = results(futures)
    write_common({}, {}, directory)
    index = Metadata({tensor.name: _describe(tensor) for group in groups for tensor in group})
    dcp.FileSystemWriter(directory).finish(index, [result for _, result in written])
    return {path: entry for path, (entry, _) in zip(paths, written, strict=True)}


def results(futures: list[Future[Any]]) -> list[Any]:
    """Their results in order; if one fails, those that have not begun never do."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _into_files(tensors: list[StreamedTensor]) -> list[list[StreamedTensor]]:
    total = sum(tensor.num_bytes for tensor in tensors)
    limit = min(_MAX_FILE, -(-total // (THREADS * _FILES_PER_THREAD)))
    groups: list[list[StreamedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    return groups


def _describe(tensor: StreamedTensor) -> TensorStorageMetadata:
    shape = torch.Size(tensor.shape)
    chunk = ChunkStorageMetadata(torch.Size([0] * len(shape)), shape)
    return TensorStorageMetadata(TensorProperties(tensor.dtype), shape, [chunk])


def _write_file(path: Path, tensors: list[StreamedTensor]) -> tuple[FileEntry, list[WriteResult]]:
    places = []
    with HashedFile(path) as file:
        for tensor in tensors:
            begin = file.size
            before, after = archive_around(tensor.dtype, tensor.shape)
            file.write(before)
            for piece in tensor.pieces():
                for block in blocks(piece):
                    file.write(block)
            if file.size - begin != len(before) + tensor.num_bytes:
                raise AssertionError(f"{tensor.name}: its pieces do not make up a tensor of {tensor.shape}")
            file.write(after)
            info = _StorageInfo(path.name, begin, file.size - begin)
            place = MetadataIndex(tensor.name, torch.Size([0] * len(tensor.shape)))
            places.append(WriteResult(place, info.length, info))
            file.write(bytes(-file.size % _ALIGNMENT))
        return file.entry(), places


# --- reading ------------------------------------------------------------------------------------------


class WeightFiles(Mapping[str, torch.Tensor]):
    """The weights in a directory of sharded files, as whole tensors, each read when it is asked for.

    Tensors that lie in one piece are views of their file; do not change them.

    Raises:
        DamagedCheckpoint: the index, or a file when a tensor is asked for, cannot be read.
        UntrustedCheckpoint: it is not an index, or a file is not as it says.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        index = read_index(directory)
        self._tensors = {
            name: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
        }
        self._places: dict[tuple[str, torch.Size], _StorageInfo] = {
            (place.fqn, place.offset): info
            for place, info in index.storage_data.items()
            if place.fqn in self._tensors
        }
        self._files: dict[Path, MappedFile] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].properties.dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._tensors[name]
        if len(entry.chunks) == 1:
            return self._chunk(name, entry.chunks[0])
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            window = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                window = window.narrow(dim, offset, size)
            part = self._chunk(name, chunk)
            window.copy_(part)
            give_back(part)
        return whole

    def _chunk(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        info = self._places.get((name, chunk.offsets))
        if info is None:
            raise UntrustedCheckpoint(f"{self._directory}: its index has no place for {name}; {_NOT_OURS}")
        path = self._directory / info.relative_path
        try:
            if path not in self._files:
                self._files[path] = MappedFile(path)
            file = self._files[path]
            extent = unpickled_extents(file, info.offset, info.length)
            if isinstance(extent, Extent) and extent.shape == tuple(chunk.sizes):
                return file.tensor(extent)
        except UntrustedPickle as error:
            raise untrusted(path, error) from None
        except OSError as error:
            raise DamagedCheckpoint(
                f"{path}: cannot be read ({error.strerror}); use another checkpoint"
            ) from None
        except ValueError:  # damaged: in another way not what the index says
            pass
        raise UntrustedCheckpoint(f"{path}: holds something else for {name} than its index says; {_NOT_OURS}")
