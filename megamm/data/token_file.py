"""Token sequences on disk, in the layout of megatron-core's IndexedDataset (.bin and .idx).

.bin holds the ids of all sequences back to back; .idx holds, little-endian: the magic `MMIDIDX\\0\\0`,
version (u64 = 1), dtype code (u8), number of sequences and of document bounds (u64 each), the lengths
(i32), the byte offsets (i64) and the document bounds (i64; here every sequence is a document).
megatron-core's reader believes all of it; this one compares what it uses with the size of the file.
Both files are mapped, so opening costs the same for any number of sequences.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from megamm.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
REMEDY = "the file is damaged, run `megamm prepare` again"
BLOCK = 1 << 18  # sequences that are converted at once when an index is written


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest id type that megatron-core reads for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def write_index(target: IO[bytes], lengths: IO[bytes], count: int, dtype: np.dtype) -> None:
    """Write the .idx of `count` sequences in bounded memory.

    Args:
        lengths: a file with the length of each (i32).
    """
    target.write(HEADER.pack(MAGIC, 1, CODES[dtype], count, count + 1))
    for block in _blocks(lengths, count):
        target.write(block.tobytes())
    end = 0
    for block in _blocks(lengths, count):
        ends = end + np.cumsum(block, dtype="<i8") * dtype.itemsize
        target.write((ends - block * dtype.itemsize).tobytes())
        end = int(ends[-1])
    for first in range(0, count + 1, BLOCK):
        target.write(np.arange(first, min(first + BLOCK, count + 1), dtype="<i8").tobytes())


def _blocks(lengths: IO[bytes], count: int) -> Iterator[np.ndarray]:
    lengths.seek(0)
    for first in range(0, count, BLOCK):
        yield np.frombuffer(lengths.read(4 * min(BLOCK, count - first)), "<i4")


class TokenFile:
    """Read-only token sequences, mapped into memory.

    Attributes:
        tokens: ids of all sequences back to back: [tokens] of the file's dtype.
        lengths, offsets: of each sequence, in ids and in bytes: [n] i32 and i64, as stored.
    """

    def __init__(self, bin_path: Path, idx_path: Path):
        """Raises InputError where header and sizes of the files contradict each other."""
        self.path = idx_path
        self.dtype, count = _read_header(idx_path)
        index = map_file(idx_path, np.dtype("u1"))
        at = HEADER.size
        self.lengths = index[at : at + 4 * count].view("<i4")
        self.offsets = index[at + 4 * count : at + 12 * count].view("<i8")
        size, end = bin_path.stat().st_size, 0
        if count:
            end = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize
        if size != end:
            raise InputError(f"{bin_path}: has {size} bytes where its index says {end}; {REMEDY}")
        self.tokens = map_file(bin_path, self.dtype)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        """The ids of sequence `row`: [length] of the file's dtype, a view."""
        start, end = self.span(row)
        return self.tokens[start:end]

    def span(self, row: int) -> tuple[int, int]:
        """Sequence `row` holds the tokens start ... end - 1.

        Raises:
            InputError: the index is damaged there.
        """
        start, rest = divmod(int(self.offsets[row]), self.dtype.itemsize)
        end = start + int(self.lengths[row])
        if rest or not 0 <= start < end <= len(self.tokens):
            raise self._damaged()
        return start, end

    def spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`span` of the sequences `rows` [n], which must be those of the index: [n] int64 each. Lengths and
        offsets are compared with each other, since no checksum is."""
        rows, width = np.asarray(rows), self.dtype.itemsize
        offsets, last = self.offsets[rows], len(self) - 1
        follows = np.where(rows < last, self.offsets[np.minimum(rows + 1, last)], len(self.tokens) * width)
        starts, ends = offsets // width, follows // width
        good = (starts >= 0) & (starts < ends) & (ends - starts == self.lengths[rows])
        if not good.all() or (ends > len(self.tokens)).any() or ((offsets | follows) % width).any():
            raise self._damaged()
        return starts, ends

    def _damaged(self) -> InputError:
        return InputError(f"{self.path}: holds impossible lengths or offsets; {REMEDY}")


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file as a read-only array mapped into memory (an empty file cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # A plain array view: indexing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """Type of the ids and number of sequences."""
    with open(path, "rb") as file:
        data = file.read(HEADER.size)
    if len(data) < HEADER.size:
        raise InputError(f"{path}: is too short for an index; {REMEDY}")
    magic, version, code, count, documents = HEADER.unpack(data)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise InputError(f"{path}: does not begin like an index of token sequences; {REMEDY}")
    if documents != count + 1 or path.stat().st_size != HEADER.size + 12 * count + 8 * documents:
        raise InputError(f"{path}: its length contradicts its number of sequences; {REMEDY}")
    return DTYPES[code], count
