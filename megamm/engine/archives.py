"""What torch.save writes for a tensor, apart from its numbers.

A tensor in a file of a checkpoint is an archive of its own. Written as frame, numbers, frame, straight from
the tensor's memory, it costs one pass less than torch.save, which adds a checksum of the numbers: that of a
checkpoint's files is in the manifest.
"""

from __future__ import annotations

import functools
import io
import os
from typing import Any, BinaryIO, cast

import torch


@functools.lru_cache(maxsize=4096)
def archive_around(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What torch.save writes before and after the numbers of a tensor."""
    frame = _Frame()
    with torch.serialization.skip_data():  # the numbers are skipped, so this memory is never touched
        torch.save(torch.empty(shape, dtype=dtype), cast(BinaryIO, frame))
    return bytes(frame.before), bytes(frame.after)


class _Frame(io.RawIOBase):
    """Takes what is written before and behind the one place that is skipped."""

    def __init__(self) -> None:
        self.before, self.after = bytearray(), bytearray()
        self._current = self.before

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._current += bytes(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or self._current is self.after:
            raise AssertionError("torch.save skips more than the numbers of one tensor")
        self._current = self.after
        return len(self.before) + offset
