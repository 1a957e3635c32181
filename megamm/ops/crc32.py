"""CRC-32 checksums of many records in one call: those of zlib.crc32, at several times its speed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megamm.ops import fused_devices

_FUSED = "cpu" in fused_devices("crc32_rows")


class Part(NamedTuple):
    """An array of which every row has a stretch.

    Attributes:
        array: [n, ...], contiguous, of any type.
        starts, ends: [rows] int64; row i has the elements starts[i] ... ends[i] - 1 of the first dimension.
    """

    array: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor


def crc32_rows(parts: Sequence[Part], seeds: torch.Tensor) -> torch.Tensor:
    """The checksum of each row: zlib.crc32 over its bytes in all parts, one part after the other.

    Args:
        seeds: [rows] int64, of which 32 bits count: the `value` that zlib.crc32 starts from.
    Returns:
        [rows] int64, 0 ... 2**32 - 1.

    Raises:
        IndexError: a stretch lies outside of its array.
        ValueError: an array is not contiguous, or starts, ends and seeds are not all [rows] int64.
    """
    if _FUSED:
        arrays, starts, ends = zip(*parts, strict=True) if parts else ((), (), ())
        found: torch.Tensor = torch.ops.megamm.crc32_rows(arrays, starts, ends, seeds)
        return found
    return crc32_rows_ref(parts, seeds)


def crc32_rows_ref(parts: Sequence[Part], seeds: torch.Tensor) -> torch.Tensor:
    """The same function with zlib: what the operator is tested against and the fallback without it."""
    for tensor in [seeds, *(x for part in parts for x in part[1:])]:
        if tensor.dtype != torch.int64 or tensor.shape != (len(seeds),):
            raise ValueError(
                f"crc32_rows: {tensor.dtype} {list(tensor.shape)}, expected int64 [{len(seeds)}]"
            )
    values = [seed & 0xFFFFFFFF for seed in seeds.tolist()]
    for array, starts, ends in parts:
        if array.dim() == 0 or not array.is_contiguous():
            raise ValueError(f"crc32_rows: an array is {list(array.shape)}, expected a contiguous [n, ...]")
        if not ((starts >= 0) & (starts <= ends) & (ends <= len(array))).all():
            raise IndexError(f"crc32_rows: a row is not inside of an array of {len(array)}")
        whole = array.numpy()
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            values[i] = zlib.crc32(whole[start:end].view("u1").data, values[i])
    return torch.tensor(values, dtype=torch.int64)
