"""From stored samples to rows of token ids, many samples per call.

A sample is a stretch of two flat arrays (usually mapped files): ids, in which an image is one placeholder,
and for each id whether it is learnt. As a document of a row it has every image expanded to the positions that
the image takes, is cut to fit, and has the labels shifted. `kept_ref` and `document_ref` are the rule; the
compiled operators do the same in one pass over many samples. They take CPU tensors alone, outside of graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from megamm.batch import IGNORE_INDEX
from megamm.ops import fused_devices

_FUSED = "cpu" in fused_devices("fill_rows")


class Stretches(NamedTuple):
    """n samples: numbers starts[i] ... ends[i] - 1 of the flat arrays, none of them empty.

    Attributes:
        tokens: [T] uint16 or int32.
        learnt: [T] uint8, not 0 where the token is learnt.
        starts, ends: [n] int64.
    """

    tokens: torch.Tensor
    learnt: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor

    @staticmethod
    def of(samples: Sequence[tuple[np.ndarray, np.ndarray]]) -> Stretches:
        """The samples (tokens [n], learnt [n]), copied one behind the other."""
        tokens = np.concatenate([tokens.astype(np.int32) for tokens, _ in samples])
        learnt = np.concatenate([learnt.astype(np.uint8) for _, learnt in samples])
        lengths = torch.tensor([len(tokens) for tokens, _ in samples])
        ends = lengths.cumsum(0)
        return Stretches(torch.from_numpy(tokens), torch.from_numpy(learnt), ends - lengths, ends)


class Sizes(NamedTuple):
    """What is left of n samples when they are cut.

    Attributes:
        table: [5, n] int64, a row for each of the properties.
    """

    table: torch.Tensor

    @property
    def positions(self) -> np.ndarray:
        """[n], at least 1."""
        return self.table.numpy()[0]

    @property
    def images(self) -> np.ndarray:
        """[n], images that are left."""
        return self.table.numpy()[1]

    @property
    def placeholders(self) -> np.ndarray:
        """[n], images that there were; truncation takes the last ones."""
        return self.table.numpy()[2]

    @property
    def num_labels(self) -> np.ndarray:
        """[n], positions that carry loss."""
        return self.table.numpy()[3]

    @property
    def truncated(self) -> np.ndarray:
        """[n], 1 where something was cut off, else 0."""
        return self.table.numpy()[4]


class Image(NamedTuple):
    """An image in a sequence: its placeholder's id, and the positions that it takes (at least 1)."""

    id: int
    positions: int


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over the memory of `array`, also where that may only be read (a mapped file). Reading is all
    that the operators here do; whoever writes through it is killed."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it may not be written to
        return torch.from_numpy(array)


def document_sizes(
    samples: Stretches, max_positions: torch.Tensor, max_images: torch.Tensor, image: Image
) -> Sizes:
    """What is left of each sample in a place of max_positions [n] (at least 1) and max_images [n], int64.

    Raises:
        IndexError: a stretch is empty or outside of the arrays.
        ValueError: other types, shapes or limits than these.
    """
    if _FUSED:
        return Sizes(
            torch.ops.megamm.document_sizes(*samples, max_positions, max_images, image.positions, image.id)
        )
    return document_sizes_ref(samples, max_positions, max_images, image)


def fill_rows(
    samples: Stretches,
    sizes: Sizes,
    rows: torch.Tensor,
    num_rows: int,
    length: int,
    image: Image,
    pad_id: int,
    restart: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, labels, position_ids), each [num_rows, length] int64: the documents in their rows, one
    after the other, then padding.

    Args:
        sizes: what document_sizes gave for these samples.
        rows: [n] int64, ascending.
        restart: positions of the padding count from 0; otherwise they go on from the document before.

    Raises:
        IndexError: a stretch is empty or outside of the arrays, a row does not exist or comes too late.
        ValueError: a row is too short for its documents, `sizes` are others than these samples', or types
            and shapes are others than these.
    """
    if _FUSED:
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.megamm.fill_rows(
            *samples, *sizes, rows, num_rows, length, image.positions, image.id, pad_id, restart
        )
        return found
    return fill_rows_ref(samples, sizes, rows, num_rows, length, image, pad_id, restart)


def gather_documents(
    flat: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(stretches starts[i] ... ends[i] - 1 of `flat` [T] back to back, their lengths [n] int64).

    Raises:
        IndexError: a stretch lies outside. ValueError: starts and ends are not [n] int64.
    """
    if _FUSED:
        found: tuple[torch.Tensor, torch.Tensor] = torch.ops.megamm.gather_documents(flat, starts, ends)
        return found
    return gather_documents_ref(flat, starts, ends)


# --- in numpy: the rule, what the operators are tested against, and what runs without them ------------------


def kept_ref(tokens: np.ndarray, max_positions: int, max_images: int, image: Image) -> tuple[int, int]:
    """(positions, images) that are left of a sample with ids `tokens` [n].

    Too long a sample is cut at `max_positions`, or before the image that would be cut through or is one too
    many; that image and those after it are dropped. A sample that loses everything keeps one position, of
    padding.
    """
    images = np.flatnonzero(tokens == image.id)
    ends = images + 1 + (image.positions - 1) * np.arange(1, len(images) + 1)
    kept = min(len(tokens) + (image.positions - 1) * len(images), max_positions)
    num_images = min(int(np.searchsorted(ends, kept, side="right")), max_images)
    if num_images < len(images):
        kept = min(kept, int(ends[num_images]) - image.positions)
    return max(kept, 1), num_images


def document_ref(
    tokens: np.ndarray, learnt: np.ndarray, kept: int, num_images: int, image: Image, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids, labels), [kept] int64 each, of a sample of which kept_ref leaves that much.

    An id that is learnt is the label of the position before it; the last position predicts nothing.
    """
    if kept == 1 and num_images == 0 and tokens[0] == image.id:
        return np.array([pad_id]), np.array([IGNORE_INDEX])
    repeats = np.where(tokens == image.id, image.positions, 1)
    ids, learnt = np.repeat(tokens, repeats)[:kept].astype(np.int64), np.repeat(learnt, repeats)[:kept]
    labels = np.where(learnt != 0, ids, IGNORE_INDEX)
    return ids, np.append(labels[1:], IGNORE_INDEX)


def document_sizes_ref(
    samples: Stretches, max_positions: torch.Tensor, max_images: torch.Tensor, image: Image
) -> Sizes:
    """The same function in numpy."""
    _check(samples, image)
    _check_numbers(len(samples.starts), max_positions, max_images)
    if (max_positions < 1).any() or (max_images < 0).any():
        raise ValueError("document_sizes: a place has no position or less than no image")
    found = []
    limits = zip(max_positions.tolist(), max_images.tolist(), strict=True)
    for number, (most_positions, most_images) in enumerate(limits):
        tokens, learnt = _piece(samples, number)
        kept, images = kept_ref(tokens, most_positions, most_images, image)
        labels = document_ref(tokens, learnt, kept, images, image, 0)[1]
        placeholders = int((tokens == image.id).sum())
        truncated = kept < len(tokens) + (image.positions - 1) * placeholders or images < placeholders
        found.append([kept, images, placeholders, int((labels != IGNORE_INDEX).sum()), truncated])
    return Sizes(torch.tensor(found, dtype=torch.int64).reshape(-1, 5).T.contiguous())


def fill_rows_ref(
    samples: Stretches,
    sizes: Sizes,
    rows: torch.Tensor,
    num_rows: int,
    length: int,
    image: Image,
    pad_id: int,
    restart: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same function in numpy."""
    _check(samples, image)
    count = len(samples.starts)
    _check_numbers(count, rows)
    if sizes.table.dtype != torch.int64 or sizes.table.shape != (5, count):
        raise ValueError(f"fill_rows: sizes are {list(sizes.table.shape)}, expected int64 [5, {count}]")
    input_ids = np.full((num_rows, length), pad_id, np.int64)
    labels = np.full((num_rows, length), IGNORE_INDEX, np.int64)
    position_ids = np.tile(np.arange(length), (num_rows, 1))
    ends, before = [0] * num_rows, 0
    for number, (row, kept, images) in enumerate(
        zip(rows.tolist(), sizes.positions.tolist(), sizes.images.tolist(), strict=True)
    ):
        if not before <= row < num_rows:
            raise IndexError(f"fill_rows: document {number} goes into row {row} of {num_rows} after {before}")
        start, end = ends[row], ends[row] + kept
        if kept < 1 or end > length:
            raise ValueError(f"fill_rows: document {number} lies at {start} ... {end} of a row of {length}")
        found = document_ref(*_piece(samples, number), kept, images, image, pad_id)
        if len(found[0]) != kept:
            raise ValueError(f"fill_rows: document {number} has more positions than its sample")
        input_ids[row, start:end], labels[row, start:end] = found
        position_ids[row, start:] = np.arange(length - start)
        ends[row], before = end, row
    if restart:
        for row, end in enumerate(ends):
            position_ids[row, end:] = np.arange(length - end)
    return torch.from_numpy(input_ids), torch.from_numpy(labels), torch.from_numpy(position_ids)


def gather_documents_ref(
    flat: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function in numpy."""
    if flat.dim() != 1:
        raise ValueError(f"gather_documents: flat is {list(flat.shape)}, expected [n]")
    _check_stretches(starts, ends, len(flat), least=0)
    array = flat.numpy()
    pieces = [array[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return torch.from_numpy(np.concatenate([array[:0], *pieces])), ends - starts


def _piece(samples: Stretches, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, learnt) of a sample."""
    piece = slice(int(samples.starts[number]), int(samples.ends[number]))
    return samples.tokens.numpy()[piece], samples.learnt.numpy()[piece]


def _check(samples: Stretches, image: Image) -> None:
    tokens, learnt = samples.tokens, samples.learnt
    if tokens.dtype not in (torch.uint16, torch.int32) or tokens.dim() != 1:
        raise ValueError(
            f"documents: tokens are {tokens.dtype} {list(tokens.shape)}, expected uint16 or int32 [n]"
        )
    if learnt.dtype != torch.uint8 or learnt.shape != tokens.shape:
        raise ValueError(
            f"documents: learnt is {learnt.dtype} {list(learnt.shape)}, expected uint8 like tokens"
        )
    if image.positions < 1:
        raise ValueError(f"documents: {image.positions} positions of an image")
    _check_stretches(samples.starts, samples.ends, len(tokens), least=1)


def _check_stretches(starts: torch.Tensor, ends: torch.Tensor, size: int, least: int) -> None:
    _check_numbers(len(starts), starts, ends)
    if not ((starts >= 0) & (ends <= size) & (ends - starts >= least)).all():
        raise IndexError(f"documents: one of them is empty or not inside of an array of {size}")


def _check_numbers(count: int, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.int64 or tensor.shape != (count,):
            raise ValueError(f"documents: {tensor.dtype} {list(tensor.shape)}, expected int64 [{count}]")
