"""Sizes of the models of `step.py`, and the samples that they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megamm.batch import Batch
from megamm.data.assemble import Assembler
from megamm.data.packing import pack_prefix
from megamm.ops.documents import Stretches

PAD_ID, IMAGE_ID = 0, 3
LABELLED = 0.2  # of the positions of an alignment sample
WITH_IMAGE = 0.94  # of the samples of LLaVA's instruction data


@dataclass(frozen=True)
class Size:
    """A model of a name.

    Attributes:
        language, vision: of a recipe, without image sizes.
        patches: of an image of an alignment sample, and of one with text of its usual length, per side.
        rows: samples of a micro-batch.
        scale: by which the lengths of LLaVA's texts are divided, so that they keep their proportion to the
            smaller image; rows of packed samples hold 4096 / scale positions.
    """

    language: dict[str, int]
    vision: dict[str, int]
    patches: tuple[int, int]
    rows: int
    scale: int

    def image(self, packed: bool) -> dict[str, int]:
        """Pixels of an image and of its patches."""
        return {"image_size": 14 * self.patches[packed], "patch_size": 14}

    def positions(self, packed: bool) -> int:
        """That an image takes."""
        return self.patches[packed] ** 2

    @property
    def length(self) -> int:
        """Of an alignment sample: its image and a text of a fifth of all positions, which carries loss."""
        return round(self.positions(False) / (1 - LABELLED)) + 1

    @property
    def capacity(self) -> int:
        """Of a packed row."""
        return 4096 // self.scale


def _language(layers: int, hidden: int, heads: int, ffn: int, vocab: int = 32000) -> dict[str, int]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "ffn_hidden_size": ffn,
        "vocab_size": vocab,
        "max_positions": 4096,
    }


def _vision(layers: int, width: int, heads: int) -> dict[str, int]:
    return {"num_layers": layers, "width": width, "num_heads": heads, "mlp_width": 4 * width}


SIZES = {
    "smoke": Size(_language(2, 64, 2, 128, 512), _vision(2, 32, 2), (2, 2), 2, 64),
    "tiny": Size(_language(4, 256, 4, 688), _vision(3, 192, 3), (24, 12), 4, 4),
    "100m": Size(_language(12, 768, 12, 2048), _vision(6, 384, 6), (24, 12), 1, 4),
    "1b": Size(_language(16, 2048, 16, 5632), _vision(12, 768, 12), (24, 12), 1, 4),
}

Sample = tuple[np.ndarray, np.ndarray]  # ids with one image token per image, which of them are learnt


def text_lengths(draw: np.random.Generator, count: int, scale: int = 1) -> np.ndarray:
    """Tokens of samples as in LLaVA's instruction data, divided by `scale`: a few hundred, a long tail."""
    lengths = np.minimum(45 + np.exp(draw.normal(5.4, 0.8, count)).astype(np.int64), 4096)
    return np.maximum(lengths // scale, 4)


def instruction_samples(size: Size, count: int) -> list[Sample]:
    """Conversations of LLaVA-like lengths, nearly all with an image; the last two fifths of the text are
    learnt."""
    draw, found = np.random.default_rng(0), []
    most = size.capacity - size.positions(True) + 1
    for length in np.minimum(text_lengths(draw, count, size.scale), most).tolist():
        ids = draw.integers(IMAGE_ID + 1, size.language["vocab_size"], length)
        if draw.random() < WITH_IMAGE:
            ids[1] = IMAGE_ID
        learnt = np.arange(length) >= length - max(2, 2 * length // 5)
        found.append((ids, learnt & (ids != IMAGE_ID)))
    return found


def interleaved_samples(vocab: int, length: int, images: int, count: int, even: bool) -> list[Sample]:
    """Documents of text with images in even distances, all of it learnt but the images.

    Args:
        length: of the longest.
        even: all are as long as that.
    """
    draw, found = np.random.default_rng(1), []
    for _ in range(count):
        own = length if even else int(draw.integers(length // 4, length + 1))
        here = images if even else max(1, images * own // length)
        ids = draw.integers(IMAGE_ID + 1, vocab, own)
        ids[1 + np.arange(here) * (own // here)] = IMAGE_ID
        found.append((ids, ids != IMAGE_ID))
    return found


def pixels_of(samples: Sequence[Sample], image_size: int) -> list[torch.Tensor]:
    """Random images of all samples, in their order."""
    generator = torch.Generator().manual_seed(7)
    count = sum(int((ids == IMAGE_ID).sum()) for ids, _ in samples)
    return [torch.randn(3, image_size, image_size, generator=generator) for _ in range(count)]


def batch_of(
    samples: Sequence[Sample], span: int, pixels: Sequence[torch.Tensor], image_size: int, row: int | None
) -> Batch:
    """The samples in one packed row of `row` positions or, without one, in rows as long as the longest.

    Args:
        span: positions of an image.
        pixels: of the images of these samples.
    """
    assembler = Assembler(span, IMAGE_ID, PAD_ID)
    count = len(samples)
    documents = assembler.documents(Stretches.of(samples), [1 << 20] * count, [1 << 10] * count)
    longest = int(documents.sizes.positions.max())
    length, packed = (longest, False) if row is None else (row, True)
    return assembler.batch(documents, length, packed, list(pixels), image_size, list(range(count)), 0)


@dataclass(frozen=True)
class Mixture:
    """The same samples twice.

    Attributes:
        packed, padded: micro-batches.
        positions: that hold a sample, which both sides have to learn from.
    """

    packed: list[Batch]
    padded: list[Batch]
    positions: int


@dataclass(frozen=True)
class Packing:
    """Which samples go into which packed row.

    Attributes:
        rows: samples of each.
        lengths, images: positions and images of all samples, in their order.
        labels: positions that carry loss, of those that are in a row.
    """

    rows: list[list[int]]
    lengths: np.ndarray
    images: np.ndarray
    labels: int

    @property
    def count(self) -> int:
        """Samples in all rows: the first ones."""
        return sum(map(len, self.rows))

    @property
    def positions(self) -> int:
        """That hold a sample."""
        return int(self.lengths[: self.count].sum())


def packing(samples: Sequence[Sample], span: int, rows: int, capacity: int, max_images: int) -> Packing:
    """As many of the samples as go into so many rows."""
    images = np.array([int((ids == IMAGE_ID).sum()) for ids, _ in samples])
    lengths = np.array([len(ids) for ids, _ in samples]) + (span - 1) * images
    order = pack_prefix(lengths, images, rows, capacity, max_images)
    learnt = sum(int(samples[s][1][1:].sum()) for row in order for s in row)
    return Packing(order, lengths, images, learnt)


def mixture(
    samples: Sequence[Sample],
    span: int,
    image_size: int,
    rows: int,
    capacity: int,
    max_images: int,
    at_once: int | None = None,
) -> Mixture:
    """As many of the samples as go into `rows` packed rows, and the same in padded batches as they come.

    Args:
        at_once: samples of a padded batch; None: as many batches as there are packed rows.
    """
    found = packing(samples, span, rows, capacity, max_images)
    pixels = pixels_of(samples[: found.count], image_size)
    first = np.cumsum(found.images) - found.images

    def batch(chosen: Sequence[int], row: int | None) -> Batch:
        own = [pixels[first[s] + n] for s in chosen for n in range(found.images[s])]
        return batch_of([samples[s] for s in chosen], span, own, image_size, row)

    parts = -(-found.count // at_once) if at_once else rows
    padded = [batch(part.tolist(), None) for part in np.array_split(np.arange(found.count), parts)]
    packed = [batch(row, capacity) for row in found.rows]
    return Mixture(packed, padded, found.positions)


def alignment_batches(size: Size, count: int) -> list[Batch]:
    """Micro-batches of the alignment stage: an image, then its caption, which carries the loss."""
    draw, pixels = np.random.default_rng(2), size.image(False)["image_size"]
    text = size.length - size.positions(False)
    found = []
    for _ in range(count):
        ids = draw.integers(IMAGE_ID + 1, size.language["vocab_size"], (size.rows, text + 1))
        ids[:, 0] = IMAGE_ID
        samples = [(row, row != IMAGE_ID) for row in ids]
        found.append(batch_of(samples, size.positions(False), pixels_of(samples, pixels), pixels, None))
    return found


def recipe_values(size: Size, packed: bool, **model: Any) -> dict[str, Any]:
    """The model section of a recipe."""
    return {"language": size.language, "vision": {**size.vision, **size.image(packed)}, **model}
