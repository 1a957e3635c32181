"""Which of very many things are the same, by their 64-bit keys, in bounded memory.

Keys lie in an unnamed file. They are sorted in parts: all keys with one remainder at a time, as few as
fit into memory. Two different things have the same key by chance once in 10^8 datasets of a million.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator

import numpy as np

from megamm.errors import RunError

PART = 1 << 22  # keys that are sorted at once: 100 MB
BLOCK = 1 << 20


def key_of(text: bytes, *numbers: int) -> int:
    """64 bits that stand for some bytes and numbers below 2^64."""
    whole = struct.pack(f"<{len(numbers)}Q", *numbers) + text
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8, salt=b"%d" % len(numbers)).digest(), "little")


def scratch(count: int, dtype: str) -> np.ndarray:
    """`count` zeros in a file that is gone when nobody has it open.

    Raises:
        RunError: no room.
    """
    size = np.dtype(dtype).itemsize * count
    if not size:
        return np.zeros(0, dtype)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a crash later
        except OSError as error:
            problem = f"has no room for {size} bytes ({error.strerror})"
            raise RunError(f"{tempfile.gettempdir()}: {problem}; free some or set TMPDIR") from None
        return np.memmap(file, dtype, "r+", shape=(count,))


def repeats(keys: np.ndarray, part: int = PART) -> tuple[np.ndarray, np.ndarray]:
    """For each of `keys` ([n] u64): the first place with the same key ([n] i64), and at first places how
    many have it ([n] u32; 0 elsewhere)."""
    first, uses = scratch(len(keys), "<i8"), scratch(len(keys), "<u4")
    parts = 1 + len(keys) // part
    for number in range(parts):
        places = _places(keys, parts, number)
        values = keys[places]
        order = np.argsort(values, kind="stable")
        places, values = places[order], values[order]
        starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else order
        sizes = np.diff(np.r_[starts, len(values)])
        first[places] = np.repeat(places[starts], sizes)
        uses[places[starts]] = sizes
    return first, uses


def _places(keys: np.ndarray, parts: int, number: int) -> np.ndarray:
    """Where the keys of one part stand, ascending."""
    found = [
        start + np.flatnonzero(keys[start : start + BLOCK] % np.uint64(parts) == number)
        for start in range(0, len(keys), BLOCK)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def blocks(count: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """The stretches (start, end) of at most `size` that make up 0 ... count."""
    for start in range(0, count, size):
        yield start, min(start + size, count)
