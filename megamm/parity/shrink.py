"""A recipe made comparable, and small enough for a laptop, without changing what kind of model it is.

Kept are the assembly, the connector, the geometry of the gated blocks, biases, grouped queries, windows,
tied embeddings, what is frozen and recomputed, packing: everything that takes another path through the
code. Sizes that only cost time become small; they divide by the layouts that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from megamm.config import DataConfig, Fp8Config, Recipe
from megamm.parity.layouts import Layout
from megamm.recipe_presets.small_model import Sizes, multiple_of, small_model, small_stage

IMAGE_ID = 3  # of the synthetic batches
MIN_MICRO_BATCHES = 4  # several, so that pipelines overlap
_VOCABULARY = 67  # odd: padded by every tensor-parallel size


def comparable(recipe: Recipe, layouts: Sequence[Layout]) -> Recipe:
    """The recipe with a step that every layout can run (the same few micro-batches) and in fp32, in which
    equal means equal."""
    round_size = math.lcm(*(layout.round for layout in layouts))
    num_micro_batches = -(-MIN_MICRO_BATCHES // round_size) * round_size
    training = replace(
        recipe.training,
        global_batch_size=num_micro_batches * recipe.training.micro_batch_size,
        precision="fp32",
        fp8=Fp8Config(),
        init_from=None,
    )
    model = replace(recipe.model, image_token_id=IMAGE_ID)
    return replace(recipe, training=training, model=model, data=_of_one_length(recipe.data))


def shrunk(recipe: Recipe, layouts: Sequence[Layout]) -> Recipe:
    """The recipe with small sizes that all layouts divide."""
    tensor = math.lcm(*(layout.tensor for layout in layouts))
    chunks = math.lcm(*(layout.pipeline * layout.virtual for layout in layouts))
    small = small_model(recipe.model, Sizes(_VOCABULARY, tensor=tensor, chunks=chunks))
    # room for two images and some text, for splits over tensor-parallel and context-parallel ranks
    split = math.lcm(
        *(layout.tensor * (2 * layout.context if layout.context > 1 else 1) for layout in layouts)
    )
    length = multiple_of(split, 2 * small.tokens_per_image + 18)
    small = replace(small, language=replace(small.language, max_positions=2 * length))
    training = small_stage(recipe.training, recipe.model, small)
    return replace(
        recipe,
        model=small,
        data=replace(
            _of_one_length(recipe.data), sequence_length=length, max_images=min(recipe.data.max_images, 2)
        ),
        training=replace(training, micro_batch_size=min(training.micro_batch_size, 2)),
    )


def _of_one_length(data: DataConfig) -> DataConfig:
    """Batches are made up: for sources of several lengths stands the longest."""
    if not isinstance(data.train, list):
        return data
    return replace(data, train=None, sequence_length=max(data.sequence_lengths()))


def changes(before: Recipe, after: Recipe) -> list[str]:
    """ "key old -> new" for every value that differs."""
    old, new = dict(_values(asdict(before))), dict(_values(asdict(after)))
    return [f"{key} {old[key]} -> {new[key]}" for key in old if old[key] != new[key]]


def _values(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
