"""Files that are read whole (recipes, tokenizers, manifests), and files that are written whole or not."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

MAX_BYTES = 1 << 28
_CHUNK = 1 << 20


def read_whole(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """The contents of a file that ought to be small, whatever is found in its place: a device without end is
    not read to its end, and a named pipe that nobody writes to is empty instead of being waited for.

    Args:
        limit: in bytes.
    Raises:
        OSError: it cannot be read, or is larger than `limit` (EFBIG); `filename` and `strerror` are set.
    """
    try:
        descriptor = open_without_waiting(path)
        try:
            return _read(descriptor, limit)
        finally:
            os.close(descriptor)
    except ValueError:  # a name that no file can have
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from None
    except OSError as error:
        error.filename = str(path)  # what is read through a descriptor does not know it
        raise


def open_without_waiting(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """os.open for reading, also as the opener of `open`: of a named pipe, without waiting for a writer. What
    a pipe with a writer has to say is waited for."""
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def _read(descriptor: int, limit: int) -> bytes:
    found = bytearray()
    while chunk := os.read(descriptor, _CHUNK):
        found += chunk
        if len(found) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return bytes(found)


@contextmanager
def written_whole(path: str | Path) -> Iterator[IO[str]]:
    """A text file that stands at `path` once the block has ended well; until then, what stood there before.
    Devices and pipes are written to as they are. What UTF-8 cannot hold becomes question marks.

    Raises:
        OSError: it cannot be written; `strerror` is set.
    """
    place = os.path.realpath(path)  # a link stays, and its target is written
    if os.path.lexists(place) and not os.path.isfile(place):
        with open(place, "w", encoding="utf-8", errors="replace") as file:
            yield file
        return
    unfinished = os.path.join(os.path.dirname(place), f".megamm-{os.getpid()}.unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8", errors="replace") as file:
            yield file
        os.replace(unfinished, place)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise
