"""Token sequences on disk, in the layout of megatron-core's IndexedDataset (.bin and .idx).

.bin holds the ids of all sequences back to back; .idx holds, little-endian: the magic `MMIDIDX\\0\\0`,
version (u64 = 1), dtype code (u8), number of sequences and of document bounds (u64 each), the lengths
(i32), the byte offsets (i64) and the document bounds (i64; here every sequence is a document).
megatron-core's reader checks little of this; this one checks all of it, so a damaged index is an error
instead of wrong tokens.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megamm.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
REMEDY = "the file is damaged, run `megamm prepare` again"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest id type that megatron-core reads for a vocabulary of this size."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> bytes:
    """The .idx of sequences with these lengths ([n] int)."""
    offsets = np.zeros(len(lengths), "<i8")
    np.cumsum(lengths[:-1] * dtype.itemsize, out=offsets[1:])
    documents = np.arange(len(lengths) + 1, dtype="<i8")
    header = HEADER.pack(MAGIC, 1, CODES[dtype], len(lengths), len(documents))
    return header + lengths.astype("<i4").tobytes() + offsets.tobytes() + documents.tobytes()


class TokenFile:
    """Read-only token sequences, mapped into memory.

    Attributes:
        starts: [n + 1] int64; sequence i holds the tokens starts[i] ... starts[i + 1] - 1.
    """

    def __init__(self, bin_path: Path, idx_path: Path):
        self.dtype, lengths, offsets = _read_index(idx_path)
        self.starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=self.starts[1:])
        if not np.array_equal(offsets, self.starts[:-1] * self.dtype.itemsize):
            raise InputError(f"{idx_path}: offsets and lengths contradict each other; {REMEDY}")
        size = bin_path.stat().st_size
        if size != self.starts[-1] * self.dtype.itemsize:
            raise InputError(
                f"{bin_path}: has {size} bytes where its index says "
                f"{self.starts[-1] * self.dtype.itemsize}; {REMEDY}"
            )
        self._tokens = map_file(bin_path, self.dtype)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The ids of sequence `row`: [length] of the file's dtype, a view."""
        return self._tokens[self.starts[row] : self.starts[row + 1]]


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file as a read-only array mapped into memory (an empty file cannot be mapped)."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    # A plain array view: indexing np.memmap itself costs several times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    data = path.read_bytes()
    if len(data) < HEADER.size:
        raise InputError(f"{path}: is too short for an index; {REMEDY}")
    magic, version, code, count, documents = HEADER.unpack_from(data)
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise InputError(f"{path}: does not begin like an index of token sequences; {REMEDY}")
    if documents != count + 1 or len(data) != HEADER.size + 12 * count + 8 * documents:
        raise InputError(f"{path}: its length contradicts its number of sequences; {REMEDY}")
    lengths = np.frombuffer(data, "<i4", count, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", count, HEADER.size + 4 * count)
    bounds = np.frombuffer(data, "<i8", documents, HEADER.size + 12 * count)
    if (lengths < 1).any() or not np.array_equal(bounds, np.arange(documents)):
        raise InputError(f"{path}: holds impossible lengths or document bounds; {REMEDY}")
    return DTYPES[code], lengths, offsets
