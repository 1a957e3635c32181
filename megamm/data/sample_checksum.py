"""The checksum of a sample: crc32 over its length, tokens, loss mask, image records and their names, mixed
with its row, so that a sample that moved is as wrong as one that changed.

The part without the row is computed where the sample is rendered, before its row is known.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch

from megamm.data.samples import Samples
from megamm.ops.crc32 import Part, crc32_rows

IMAGE_RECORD = np.dtype(
    [
        ("container", "<u4"),  # position in the manifest's list
        ("crc32", "<u4"),  # of the bytes of the image; 0: they were not read, and are not compared
        ("width", "<u4"),  # in pixels; 0: the header was not read
        ("height", "<u4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("name_end", "<i8"),  # end of its name in image_names.bin; it starts where the last one ends
    ]
)
_SIZES = struct.Struct("<QQ")
_FACTOR = 0x9E3779B1  # odd, so different rows below 2^32 give different values


def content_crc(tokens: np.ndarray, learnt: np.ndarray, records: np.ndarray, names: np.ndarray) -> int:
    """The crc32 of a sample's content.

    Args:
        tokens, learnt: [n], as they are stored.
        records: IMAGE_RECORDs [m] whose name_end counts from the start of `names`.
        names: the bytes of the names of its images (u8).
    """
    crc = zlib.crc32(_SIZES.pack(len(tokens), len(records)))
    crc = zlib.crc32(learnt.data, zlib.crc32(tokens.data, crc))
    return zlib.crc32(names.data, zlib.crc32(records.view("u1").data, crc)) if len(records) else crc


def at_rows(crcs: np.ndarray, first: int) -> np.ndarray:
    """The stored checksums of samples with content crcs [n] (u32) whose rows begin at `first`: [n] u32."""
    rows = np.arange(first, first + len(crcs), dtype=np.uint64)
    return crcs ^ (rows * np.uint64(_FACTOR)).astype("<u4")


def at_row(crc: int, row: int) -> int:
    """`at_rows` of one sample."""
    return crc ^ (row * _FACTOR & 0xFFFFFFFF)


def content_crcs(samples: Samples, images: np.ndarray, names: torch.Tensor) -> np.ndarray:
    """`content_crc` of n samples in one call: [n] int64, -1 where the names cannot be where the records say.

    Args:
        images, names: the records and the names of all images of the dataset; those of the samples exist.
    """
    (tokens, learnt, starts, ends), first, counts = samples
    behind = np.cumsum(counts)
    before, count = behind - counts, len(counts)
    records = images[np.arange(counts.sum()) + np.repeat(first - before, counts)]
    name_starts, name_ends = np.zeros(count, np.int64), np.zeros(count, np.int64)
    has = counts > 0
    later = has & (first > 0)
    name_starts[later] = images["name_end"][first[later] - 1]
    name_ends[has] = records["name_end"][behind[has] - 1]
    lost = (name_starts < 0) | (name_starts > name_ends) | (name_ends > len(names))
    name_starts[lost] = name_ends[lost] = 0
    records["name_end"] -= np.repeat(name_starts, counts)
    sizes = torch.stack([ends - starts, torch.from_numpy(counts)], dim=1)
    numbers = torch.arange(count + 1)
    parts = [
        Part(sizes, numbers[:-1], numbers[1:]),
        Part(tokens, starts, ends),
        Part(learnt, starts, ends),
        Part(
            torch.from_numpy(records.view("u1").reshape(-1, IMAGE_RECORD.itemsize)),
            *map(torch.from_numpy, (before, behind)),
        ),
        Part(names, *map(torch.from_numpy, (name_starts, name_ends))),
    ]
    crcs = crc32_rows(parts, torch.zeros(count, dtype=torch.int64)).numpy()
    return np.where(lost, -1, crcs)


def of_rows(checksums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The content crcs of which `at_rows` gave the stored checksums [n] of the samples `rows` [n]: int64."""
    return (checksums ^ (rows.astype(np.uint64) * np.uint64(_FACTOR)).astype("<u4")).astype(np.int64)
