"""Which sample comes when: a pure function of (seed, stage, global sample index).

Every epoch is a permutation of the dataset, drawn afresh from (seed, stage, epoch): a Feistel network
on the smallest power of two that holds the dataset, walked until it lands inside (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). Nothing is stored, so resuming needs no state, and any
position of any epoch costs the same.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

NUM_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's finaliser


def sample_at(seed: int, stage: str, index: int, size: int) -> int:
    """Dataset row of global sample `index` in a dataset of `size` rows."""
    return int(samples_at(seed, stage, index, 1, size)[0])


def samples_at(seed: int, stage: str, start: int, count: int, size: int) -> np.ndarray:
    """Dataset rows of the global samples start ... start + count - 1: [count] int64."""
    if size < 1 or start < 0:
        raise ValueError(f"no sample {start} in a dataset of {size} rows")
    if not count:
        return np.empty(0, np.int64)
    epoch, first = divmod(start, size)
    # all epochs in one pass: a packed step of a small dataset takes hundreds of them
    epochs, positions = np.divmod(first + np.arange(count), size)
    keys = np.stack([_round_keys(seed, stage, epoch + i) for i in range(int(epochs[-1]) + 1)], axis=1)
    return _permute(positions.astype(np.uint64), keys[:, epochs], size).astype(np.int64)


def hashed(*key: object) -> int:
    """A 64-bit number drawn from `key`, the same in every process and on every machine."""
    text = "\0".join(str(part) for part in key).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def substitute_at(seed: int, stage: str, index: int, attempt: int, size: int) -> int:
    """Dataset row that replaces global sample `index` in its `attempt`-th (from 1) replacement."""
    return hashed(seed, stage, "substitute", index, attempt) % size


def _permute(positions: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Where `positions` [n] of an epoch of `size` rows come to lie under their round keys [rounds, n]."""
    bits = max(2, (size - 1).bit_length())
    rows = _feistel(positions, keys, bits)
    outside = np.flatnonzero(rows >= size)
    while outside.size:
        rows[outside] = _feistel(rows[outside], keys[:, outside], bits)
        outside = outside[rows[outside] >= size]
    return rows


@lru_cache(maxsize=64)
def _round_keys(seed: int, stage: str, epoch: int) -> np.ndarray:
    return np.array([hashed(seed, stage, "order", epoch, i) for i in range(NUM_ROUNDS)], dtype=np.uint64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """An unbalanced Feistel network: a permutation of the numbers below 2 ** bits."""
    low_bits = bits // 2
    left_bits, right_bits = bits - low_bits, low_bits
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = left ^ (_mix(right + key) & np.uint64((1 << left_bits) - 1))
        left, right = right, mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * _MIX[0]
    values = (values ^ (values >> np.uint64(27))) * _MIX[1]
    return values ^ (values >> np.uint64(31))
