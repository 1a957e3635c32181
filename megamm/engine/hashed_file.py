"""Files that are hashed while they are written: the hash is that of what was meant, whatever became of it."""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xxhash import xxh3_128

from megamm.engine.manifest import AT_ONCE, FileEntry

_START_EVERY = 1 << 25  # bytes
_START_WRITING = 2  # of Linux's sync_file_range, which the os module has no name for
_libc = ctypes.CDLL(None)


def write_at(file: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at a place of a file (descriptor)."""
    rest = memoryview(data)
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count


class HashedFile:
    """A new file, written from its beginning to its end.

    Args:
        start_disk: let the disk begin at once; otherwise it waits for `sync` while the processors work, and
            then they wait for it.
    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path, start_disk: bool = False) -> None:
        self._file = path.open("wb", buffering=0)
        self._hash = xxh3_128()
        self._started = 0
        # a thread of its own: the call waits where the disk has a queue
        can = start_disk and hasattr(_libc, "sync_file_range")
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="disk") if can else None
        self.size = 0

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, *error: object) -> None:
        if self._starter:
            self._starter.shutdown(cancel_futures=True)
        self._file.close()

    @property
    def name(self) -> str:
        """The path."""
        return str(self._file.name)

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`."""
        rest = memoryview(data).cast("B")
        length = rest.nbytes
        while rest:  # in pieces that the hash finds in the processor's cache
            write_at(self._file.fileno(), rest[:AT_ONCE], self.size)
            self._hash.update(rest[:AT_ONCE])
            self.size += len(rest[:AT_ONCE])
            rest = rest[AT_ONCE:]
            if self._starter and self.size - self._started >= _START_EVERY:
                self._starter.submit(self._start, self._started, self.size - self._started)
                self._started = self.size
        return length

    def _start(self, begin: int, length: int) -> None:
        """A hint: a file system that cannot does without."""
        place = (ctypes.c_int64(begin), ctypes.c_int64(length))
        _libc.sync_file_range(self._file.fileno(), *place, _START_WRITING)

    def flush(self) -> None:
        """Nothing is held back."""

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.size

    def sync(self) -> None:
        """Wait until the disk has everything."""
        os.fsync(self._file.fileno())

    def entry(self) -> FileEntry:
        """Size and hash of what was written."""
        return FileEntry(self.size, self._hash.hexdigest())
