"""Tensors of training on their way into files, which may not change before they are there."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import torch

_BLOCK = 1 << 18  # bytes that stay in the processor's cache until they are written and hashed


class HostCopies:
    """Copies of tensors in host memory, which is kept from one save to the next: fresh pages cost several
    times more than copying into old ones."""

    def __init__(self) -> None:
        self._kept: dict[Any, torch.Tensor] = {}

    def copy(self, key: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Start a copy, which replaces the last one of the same key."""
        kept = self._kept.get(key)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._kept[key] = kept
        return kept.copy_(tensor, non_blocking=True)


class HeldTensor:
    """A tensor in host memory that is written by one thread while another goes on with training: it is read
    where it lies until `secure`, then from a copy. Training never waits for the disk.

    Args:
        is_secure: nobody changes it.
    Attributes:
        shape, dtype: of the tensor.
    """

    def __init__(self, key: Any, tensor: torch.Tensor, is_secure: bool = False) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype
        self._key, self._tensor, self._is_secure = key, tensor, is_secure
        self._bytes: memoryview | None = None
        self._lock = Lock()

    def secure(self, copies: HostCopies) -> None:
        """From here on the original may change."""
        if self._is_secure:
            return
        with self._lock:
            self._tensor = copies.copy(self._key, self._tensor)
            self._bytes, self._is_secure = None, True

    def blocks(self) -> Iterator[memoryview]:
        """The numbers in row-major order, a block at a time; each is good until the next."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        buffer = memoryview(bytearray(min(size, _BLOCK)))
        for start in range(0, size, _BLOCK):
            block = buffer[: min(_BLOCK, size - start)]
            with self._lock:
                block[:] = self._numbers()[start : start + len(block)]
            yield block

    def _numbers(self) -> memoryview:
        if self._bytes is None:
            flat = self._tensor.detach().contiguous().reshape(-1)
            self._bytes = flat.view(torch.uint8).numpy().data
        return self._bytes
