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

from megamm.config import (
    ConnectorConfig,
    CrossAttentionConfig,
    DataConfig,
    LanguageConfig,
    ModelConfig,
    Recipe,
    TrainingConfig,
    UnfreezeConfig,
    VisionConfig,
)
from megamm.parity.layouts import Layout

IMAGE_ID = 3  # of the synthetic batches
MIN_MICRO_BATCHES = 4  # several, so that pipelines overlap
_VOCABULARY = 67  # odd: padded by every tensor-parallel size
_LAYERS, _VISION_LAYERS, _CONNECTOR_LAYERS = 4, 3, 2
_HEAD_DIM, _PATCH, _SIDE = 16, 8, 2


def comparable(recipe: Recipe, layouts: Sequence[Layout]) -> Recipe:
    """The recipe with a step that every layout can run (the same few micro-batches) and in fp32, in which
    equal means equal."""
    round_size = math.lcm(*(layout.round for layout in layouts))
    num_micro_batches = -(-MIN_MICRO_BATCHES // round_size) * round_size
    training = replace(
        recipe.training,
        global_batch_size=num_micro_batches * recipe.training.micro_batch_size,
        precision="fp32",
        init_from=None,
    )
    model = replace(recipe.model, image_token_id=IMAGE_ID)
    return replace(recipe, training=training, model=model, data=_of_one_length(recipe.data))


def shrunk(recipe: Recipe, layouts: Sequence[Layout]) -> Recipe:
    """The recipe with small sizes that all layouts divide."""
    tensor = math.lcm(*(layout.tensor for layout in layouts))
    chunks = math.lcm(*(layout.pipeline * layout.virtual for layout in layouts))
    model = recipe.model
    small = replace(
        model,
        language=_language(model.language, tensor, chunks),
        vision=_vision(model.vision, tensor),
        connector=_connector(model.connector, tensor),
        cross_attention=_cross_attention(model, tensor),
        lora=replace(model.lora, rank=min(model.lora.rank, 4)),
    )
    # room for two images and some text, for splits over tensor-parallel and context-parallel ranks
    split = math.lcm(
        *(layout.tensor * (2 * layout.context if layout.context > 1 else 1) for layout in layouts)
    )
    length = _multiple_of(split, 2 * small.tokens_per_image + 18)
    small = replace(small, language=replace(small.language, max_positions=2 * length))
    return replace(
        recipe,
        model=small,
        data=replace(
            _of_one_length(recipe.data), sequence_length=length, max_images=min(recipe.data.max_images, 2)
        ),
        training=_training(recipe, small),
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


def _multiple_of(step: int, at_least: int) -> int:
    return -(-at_least // step) * step


def _language(language: LanguageConfig, tensor: int, chunks: int) -> LanguageConfig:
    heads = _multiple_of(tensor, 4)
    kv_heads = language.num_kv_heads
    if kv_heads is not None and kv_heads < language.num_heads:
        kv_heads = _multiple_of(tensor, 2)
        heads = 2 * kv_heads
    elif kv_heads is not None:
        kv_heads = heads
    return replace(
        language,
        preset=None,
        num_layers=_multiple_of(chunks, _LAYERS),
        hidden_size=heads * _HEAD_DIM,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=heads * 24,
        vocab_size=_VOCABULARY,
        sliding_window=language.sliding_window and min(language.sliding_window, 8),
        init_std=0.1,  # with 0.02 so narrow a model would hardly attend
    )


def _vision(vision: VisionConfig, tensor: int) -> VisionConfig:
    behind = vision.num_layers - range(vision.num_layers + 1)[vision.feature_layer]
    return replace(
        vision,
        preset=None,
        image_size=_SIDE * _PATCH,
        patch_size=_PATCH,
        weights_image_size=None,
        width=math.lcm(48, tensor),
        num_layers=_VISION_LAYERS,
        num_heads=4,
        mlp_width=64,
        feature_layer=-1 - min(behind, _VISION_LAYERS - 1),
    )


def _connector(connector: ConnectorConfig, tensor: int) -> ConnectorConfig:
    if connector.kind == "mlp":
        return connector
    return replace(
        connector,
        num_latents=_multiple_of(tensor, 4),
        depth=_CONNECTOR_LAYERS,
        num_heads=_multiple_of(tensor, 4),
        head_dim=8,
        cross_every=min(connector.cross_every, _CONNECTOR_LAYERS),
    )


def _cross_attention(model: ModelConfig, tensor: int) -> CrossAttentionConfig:
    cross = model.cross_attention
    if model.assembly != "cross_attention":
        return cross
    cross = replace(cross, every=min(cross.every, 2))
    if cross.geometry == "idefics":
        return cross
    return replace(cross, num_heads=_multiple_of(tensor, 4), head_dim=8)


def _training(recipe: Recipe, small: ModelConfig) -> TrainingConfig:
    """Few samples, and the same share of blocks trained and recomputed."""
    training, old = recipe.training, recipe.model
    used_blocks = range(small.vision.num_layers + 1)[small.vision.feature_layer]
    unfreeze = UnfreezeConfig(
        vision=_block(training.unfreeze.vision, old.vision.num_layers, used_blocks),
        language=_block(training.unfreeze.language, old.language.num_layers, small.language.num_layers),
    )
    layers = training.recompute.layers
    recompute = replace(training.recompute, layers=layers and min(layers, 1))
    micro_batch_size = min(training.micro_batch_size, 2)
    return replace(training, unfreeze=unfreeze, recompute=recompute, micro_batch_size=micro_batch_size)


def _block(first: int | None, num_blocks: int, new_num_blocks: int) -> int | None:
    """The first trained block among fewer: not the first one of all unless it was, never none."""
    if not first:
        return first
    return min(max(1, first * new_num_blocks // num_blocks), new_num_blocks - 1)
