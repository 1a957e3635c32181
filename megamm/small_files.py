"""Files that are read whole: recipes, configurations, tokenizers, manifests."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            os.set_blocking(descriptor, True)  # a pipe that has a writer is waited for
            return _read(descriptor, limit)
        finally:
            os.close(descriptor)
    except ValueError:  # a name that no file can have
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path)) from None
    except OSError as error:
        error.filename = str(path)  # what is read through a descriptor does not know it
        raise


def _read(descriptor: int, limit: int) -> bytes:
    found = bytearray()
    while chunk := os.read(descriptor, _CHUNK):
        found += chunk
        if len(found) > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    return bytes(found)
