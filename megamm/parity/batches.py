"""Micro-batches for a comparison: random tokens and pixels, image counts that differ, samples without any.

They go through the code that makes batches of stored samples (`megamm.data.assemble`), packed if the recipe
packs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.assemble import Assembler
from megamm.ops.documents import Stretches
from megamm.parity.shrink import IMAGE_ID

# images of the samples, in turn: micro-batches of two have different numbers, and one has none at all
_NUM_IMAGES = (1, 2, 2, 0, 0, 0, 1, 1)
_PAD_ID = 0
_Sample = tuple[np.ndarray, np.ndarray]


def synthetic_batch(recipe: Recipe, index: int) -> Batch:
    """The `index`-th micro-batch, the same on every rank of every layout."""
    rng = np.random.default_rng(index)
    size, length = recipe.training.micro_batch_size, recipe.data.sequence_length
    assembler = Assembler(recipe.model.tokens_per_image, IMAGE_ID, _PAD_ID)
    packed = recipe.data.pack
    samples = list(_packed(recipe, assembler, index, rng)) if packed else []
    for row in range(0 if packed else size):
        tokens = rng.integers(length * 2 // 3, length + 1)
        samples.append(_sample(recipe, assembler, index * size + row, int(tokens), rng))
    limits = [length] * len(samples), [recipe.data.max_images] * len(samples)
    documents = assembler.documents(Stretches.of(samples), *limits)
    pixels = recipe.model.vision.image_size
    num_images = int(documents.sizes.images.sum())
    images = rng.standard_normal((num_images, 3, pixels, pixels), dtype=np.float32)
    # the first sample's number tells micro-batches apart
    return assembler.batch(
        documents,
        size * length if packed else length,
        packed,
        list(torch.from_numpy(images)),
        pixels,
        sample_ids=[index * 1000 + number for number in range(len(samples))],
        num_skipped=0,
    )


def _packed(recipe: Recipe, assembler: Assembler, index: int, rng: np.random.Generator) -> Iterator[_Sample]:
    """Samples for one packed row, that leave some padding."""
    size, length = recipe.training.micro_batch_size, recipe.data.sequence_length
    room, images, number = size * length - 3, size * recipe.data.max_images, index * 3
    while room >= length // 2:
        tokens = int(rng.integers(length // 3, min(length, room) + 1))
        sample = _sample(recipe, assembler, number, tokens, rng)
        positions, wanted = assembler.kept(sample[0], length, recipe.data.max_images)
        if wanted > images:
            return
        yield sample
        room, images, number = room - positions, images - wanted, number + 1


def _sample(
    recipe: Recipe, assembler: Assembler, number: int, length: int, rng: np.random.Generator
) -> _Sample:
    """(ids, which of them are learnt) of a sample of about `length` positions: a question that carries no
    loss, images, an answer."""
    span = assembler.tokens_per_image
    wanted = min(_NUM_IMAGES[number % len(_NUM_IMAGES)], recipe.data.max_images)
    num_images = min(wanted, (length - 4) // span)
    num_tokens = length - num_images * (span - 1)
    tokens = rng.integers(IMAGE_ID + 1, recipe.model.language.vocab_size, num_tokens)
    # not in front of the first token, so that some text comes before the first image
    places = 1 + rng.choice(max(num_tokens - 2, 1), num_images, replace=False)
    tokens[places] = IMAGE_ID
    learnt = np.arange(num_tokens) >= min(2 + number % 5, num_tokens - 1)
    learnt[places] = False
    return tokens, learnt
