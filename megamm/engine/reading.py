"""Tensors of a checkpoint's files, read from the disk into their places, without a copy between.

Unlike through a memory map, a disk that fails is an error, and not the end of the process.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index

from megamm.engine.mapped_files import Extent, FilePart

_AT_ONCE = 1 << 30  # bytes that one call reads


class OpenFile:
    """A file whose bytes are read when they are asked for.

    Raises:
        OSError: it cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        return self.read(part.start, part.stop - part.start)

    def read(self, offset: int, length: int) -> bytes:
        """Some of its bytes; fewer at its end."""
        data = bytearray(max(0, min(length, self._size - offset)))
        self.fill(memoryview(data), offset)
        return bytes(data)

    def part(self, offset: int, length: int) -> BinaryIO:
        """A part of the file as a file of its own."""
        return io.BufferedReader(FilePart(self, offset, length))

    def fill(self, memory: memoryview, offset: int) -> None:
        """Fill all of `memory` with the bytes from `offset` on.

        Raises:
            ValueError: the file ends before.
        """
        while memory:
            try:
                count = os.preadv(self._file.fileno(), [memory[:_AT_ONCE]], offset)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
            if not count:
                raise ValueError(f"{self.path}: ends before its index says")
            memory, offset = memory[count:], offset + count

    def read_into(
        self, target: torch.Tensor, extent: Extent, offsets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Read a box of a tensor that lies in the file in one piece.

        Args:
            target: of the size `lengths`; it may be of another type, and on any device.
            extent: where the tensor lies.
            offsets, lengths: of the box.
        Raises:
            ValueError: the box, or the tensor, is not there.
        """
        shape = extent.shape
        is_inside = len(shape) == len(offsets) == len(lengths) and all(
            first >= 0 and first + count <= size
            for first, count, size in zip(offsets, lengths, shape, strict=True)
        )
        if not is_inside or extent.stride != torch.empty(shape, device="meta").stride():
            raise ValueError(f"{self.path}: has no such tensor where its index says")
        if extent.end > self._size:
            raise ValueError(f"{self.path}: ends before its index says")
        if tuple(lengths[1:]) == shape[1:]:  # rows follow each other
            first = offsets[0] * prod(shape[1:]) if shape else 0
            self._read_numbers(target, extent.offset + first * extent.dtype.itemsize, extent.dtype)
            return
        whole = torch.empty(shape, dtype=extent.dtype)
        self._read_numbers(whole, extent.offset, extent.dtype)
        target.copy_(narrow_tensor_by_index(whole, offsets, lengths))

    def _read_numbers(self, target: torch.Tensor, offset: int, dtype: torch.dtype) -> None:
        is_direct = target.device.type == "cpu" and target.is_contiguous() and target.dtype == dtype
        place = target if is_direct else torch.empty(target.shape, dtype=dtype)
        if place.numel():
            self.fill(place.reshape(-1).view(torch.uint8).numpy().data, offset)
        if not is_direct:
            target.copy_(place)
