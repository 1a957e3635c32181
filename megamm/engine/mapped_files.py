"""Tensors in files, without reading the files: memory maps, and what pickled tensors say about themselves.

A page of a map costs memory once it was looked at. `blocks` looks at a tensor piece by piece and gives every
page back, so that it does not matter how large the tensors are.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import pickletools
import re
import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

_PAGE = mmap.PAGESIZE
_BLOCK = 1 << 20  # bytes; stays in the processor's cache from one use to the next
_POPULATE_READ = 22  # of Linux's madvise, which the mmap module has no name for
_libc = ctypes.CDLL(None)
_MOST_VALUES = 1 << 20  # of an archive: tensors and what else is beside them
_ZIP = b"PK\x03\x04"  # how an archive begins


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies in a file.

    Attributes:
        offset: of its first number, in bytes.
        stride: in numbers, as torch counts.
    """

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """From its first number to its last."""
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.offset + self.num_bytes


class MappedFile:
    """A file whose bytes become tensors without a copy.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # not blocking: a named pipe in the place of a file would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # a private copy that is never written to: torch warns of memory that it may not change
            self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        self.size = len(self._map)
        address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        _maps[address] = address + self.size
        weakref.finalize(self._map, _maps.pop, address)

    def read(self, offset: int, length: int) -> bytes:
        """Some of its bytes; fewer at its end."""
        return self._map[offset : offset + length]

    def tensor(self, extent: Extent) -> torch.Tensor:
        """A view of the file (a copy where its numbers are not aligned).

        Raises:
            ValueError: the tensor reaches beyond the file.
        """
        is_backwards = min(extent.stride, default=0) < 0
        if extent.num_bytes == 0 and not is_backwards:
            return torch.empty(extent.shape, dtype=extent.dtype)
        if extent.offset < 0 or is_backwards or extent.end > self.size:
            raise ValueError(f"its {extent.num_bytes} bytes from {extent.offset} reach beyond {self.size}")
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=extent.num_bytes, offset=extent.offset)
        if raw.data_ptr() % extent.dtype.itemsize:
            raw = raw.clone()
        return raw.view(extent.dtype).as_strided(extent.shape, extent.stride)

    def part(self, offset: int, length: int) -> BinaryIO:
        """A part of the file as a file of its own."""
        return io.BufferedReader(FilePart(self._map, offset, length))


class Readable(Protocol):
    """A file that is read at any place."""

    def read(self, offset: int, length: int, /) -> bytes: ...

    def part(self, offset: int, length: int, /) -> BinaryIO: ...


class Bytes(Protocol):
    """What gives bytes for a slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class FilePart(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, data: Bytes, offset: int, length: int) -> None:
        self._data, self._offset, self._position = data, offset, 0
        self._length = max(0, min(length, len(data) - offset))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        start = self._offset + self._position
        count = max(0, min(len(buffer), self._length - self._position))
        buffer[:count] = self._data[start : start + count]
        self._position += count
        return count


def blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The numbers of a tensor in row-major order, a megabyte at a time."""
    flat = tensor.detach().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    address = flat.data_ptr()
    is_mapped = _is_mapped(address)
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        if is_mapped:  # all pages at once cost half of what they cost one after the other
            _advise(address + start, len(block), _POPULATE_READ)
        yield block
        if is_mapped:
            _advise(address + start, len(block), mmap.MADV_DONTNEED)


def give_back(tensor: torch.Tensor) -> None:
    """Free the pages of a mapped file that were looked at through a tensor; they can be looked at again."""
    address = tensor.data_ptr()
    if tensor.numel() and _is_mapped(address):
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        _advise(address, (last + 1) * tensor.itemsize, mmap.MADV_DONTNEED)


# Where this module has mapped files: address -> end. Pages of any other memory must not be given back.
_maps: dict[int, int] = {}


def _is_mapped(address: int) -> bool:
    return any(start <= address < end for start, end in list(_maps.items()))


def _advise(address: int, length: int, advice: int) -> None:
    """Advice is never needed: a kernel that does not know it (before 5.14) does without."""
    start = address // _PAGE * _PAGE
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), advice)


class UntrustedPickle(ValueError):
    """A file that only its author could vouch for."""


def unpickled_extents(file: Readable, offset: int, length: int) -> Any:
    """What torch.save wrote into a part of a file, with an `Extent` for every tensor; reads no numbers.

    Only tensors and plain containers are made (weights_only): nothing in the file is executed.

    Raises:
        UntrustedPickle: it is no archive of tensors, and was not read further.
        ValueError: damaged.
    """
    if file.read(offset, len(_ZIP)) != _ZIP:
        raise UntrustedPickle("is no archive, as torch.save has written since release 1.6")
    _refuse_bombs(file, offset, length)
    try:
        # numbers are not read for the meta device, but torch notes where they are
        content = torch.load(file.part(offset, length), map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = name[1] if name else _first_line(error)
        raise UntrustedPickle(f"holds {what}, which is no tensor and might run code") from None
    except Exception as error:  # torch raises almost anything for damaged files
        raise ValueError(_first_line(error)) from None
    return _with_extents(content, offset, count(1))


def _refuse_bombs(file: Readable, offset: int, length: int) -> None:
    """What would take more memory than the file has bytes, before any of it is unpickled.

    Raises:
        UntrustedPickle: compressed members, or buffers of a size that the file only names.
        ValueError: damaged.
    """
    try:
        with zipfile.ZipFile(file.part(offset, length)) as archive:
            members = archive.infolist()
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise UntrustedPickle("holds compressed data, which torch.save does not write")
            programs = [member for member in members if member.filename.endswith("/data.pkl")]
            for program in programs:
                for code, argument, _ in pickletools.genops(archive.read(program)):
                    if code.name == "GLOBAL" and str(argument).endswith(" bytearray"):
                        raise UntrustedPickle("holds bytearray, which is no tensor and may have any size")
    except UntrustedPickle:
        raise
    except Exception as error:  # damaged archives lead to errors of many kinds
        raise ValueError(_first_line(error)) from None


def _with_extents(content: Any, offset: int, number: Iterator[int]) -> Any:
    """`content` with extents for tensors; `number` counts the values, since few bytes can name very many."""
    if next(number) > _MOST_VALUES:
        raise ValueError(f"holds more than {_MOST_VALUES} values")
    if isinstance(content, dict):
        return {key: _with_extents(value, offset, number) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_with_extents(value, offset, number) for value in content]
    if isinstance(content, torch.Tensor):
        start = getattr(content.untyped_storage(), "_checkpoint_offset", None)
        if start is None:
            raise ValueError("has a tensor of a kind that is not stored as plain numbers")
        first = offset + start + content.storage_offset() * content.dtype.itemsize
        return Extent(first, content.dtype, tuple(content.shape), content.stride())
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
