"""A model made small without becoming another kind of model.

Kept are the assembly, the connector, the geometry of the gated blocks, biases, grouped queries, windows,
tied embeddings: everything that takes another path through the code. Sizes that only cost time become small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megamm.config import (
    ConnectorConfig,
    CrossAttentionConfig,
    LanguageConfig,
    ModelConfig,
    RecomputeConfig,
    TrainingConfig,
    UnfreezeConfig,
    VisionConfig,
)


@dataclass(frozen=True)
class Sizes:
    """Of a small model.

    Attributes:
        layers, vision_layers, connector_layers: at least; `layers` is rounded up to a multiple of `chunks`.
        heads, head_dim: of the decoder; heads are rounded up to a multiple of `tensor`.
        ffn_per_head: the decoder's ffn_hidden_size for each of its heads.
        width, mlp_width: of the encoder.
        patches: of a picture, along one edge.
        window: at most, where there is a sliding window.
        latents: of a resampler or Q-Former.
        tensor, chunks: what the split over tensor-parallel ranks and pipeline chunks has to divide.
    """

    vocab_size: int
    layers: int = 4
    vision_layers: int = 3
    connector_layers: int = 2
    heads: int = 4
    head_dim: int = 16
    ffn_per_head: int = 24
    width: int = 48
    mlp_width: int = 64
    patches: int = 2
    patch_size: int = 8
    window: int = 8
    latents: int = 4
    connector_head_dim: int = 8
    init_std: float = 0.1  # with 0.02 so narrow a model would hardly attend
    tensor: int = 1
    chunks: int = 1


def small_model(model: ModelConfig, sizes: Sizes) -> ModelConfig:
    """The model in these sizes; language.max_positions stays as it is."""
    return replace(
        model,
        language=_language(model.language, sizes),
        vision=_vision(model.vision, sizes),
        connector=_connector(model.connector, sizes),
        cross_attention=_cross_attention(model, sizes),
        lora=replace(model.lora, rank=min(model.lora.rank, 4)),
    )


def small_stage(training: TrainingConfig, old: ModelConfig, new: ModelConfig) -> TrainingConfig:
    """The same share of blocks trained and recomputed in the model that became `new`."""
    used_blocks = range(new.vision.num_layers + 1)[new.vision.feature_layer]
    unfreeze: UnfreezeConfig = replace(
        training.unfreeze,
        vision=_block(training.unfreeze.vision, old.vision.num_layers, used_blocks),
        language=_block(training.unfreeze.language, old.language.num_layers, new.language.num_layers),
    )
    layers = training.recompute.layers
    recompute: RecomputeConfig = replace(training.recompute, layers=layers and min(layers, 1))
    return replace(training, unfreeze=unfreeze, recompute=recompute)


def multiple_of(step: int, at_least: int) -> int:
    """The smallest multiple of `step` that is at least so large."""
    return -(-at_least // step) * step


def _language(language: LanguageConfig, sizes: Sizes) -> LanguageConfig:
    heads = multiple_of(sizes.tensor, sizes.heads)
    kv_heads = language.num_kv_heads
    if kv_heads is not None and kv_heads < language.num_heads:
        kv_heads = multiple_of(sizes.tensor, sizes.heads // 2)
        heads = 2 * kv_heads
    elif kv_heads is not None:
        kv_heads = heads
    return replace(
        language,
        preset=None,
        num_layers=multiple_of(sizes.chunks, sizes.layers),
        hidden_size=heads * sizes.head_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=heads * sizes.ffn_per_head,
        vocab_size=sizes.vocab_size,
        sliding_window=language.sliding_window and min(language.sliding_window, sizes.window),
        init_std=sizes.init_std,
    )


def _vision(vision: VisionConfig, sizes: Sizes) -> VisionConfig:
    behind = vision.num_layers - range(vision.num_layers + 1)[vision.feature_layer]
    return replace(
        vision,
        preset=None,
        image_size=sizes.patches * sizes.patch_size,
        patch_size=sizes.patch_size,
        weights_image_size=None,
        width=math.lcm(sizes.width, sizes.tensor),
        num_layers=sizes.vision_layers,
        num_heads=4,
        mlp_width=sizes.mlp_width,
        feature_layer=-1 - min(behind, sizes.vision_layers - 1),
    )


def _connector(connector: ConnectorConfig, sizes: Sizes) -> ConnectorConfig:
    if connector.kind == "mlp":
        return connector
    return replace(
        connector,
        num_latents=multiple_of(sizes.tensor, sizes.latents),
        depth=sizes.connector_layers,
        num_heads=multiple_of(sizes.tensor, 4),
        head_dim=sizes.connector_head_dim,
        cross_every=min(connector.cross_every, sizes.connector_layers),
    )


def _cross_attention(model: ModelConfig, sizes: Sizes) -> CrossAttentionConfig:
    cross = model.cross_attention
    if model.assembly != "cross_attention":
        return cross
    cross = replace(cross, every=min(cross.every, 2))
    if cross.geometry == "idefics":
        return cross
    return replace(cross, num_heads=multiple_of(sizes.tensor, 4), head_dim=sizes.connector_head_dim)


def _block(first: int | None, num_blocks: int, new_num_blocks: int) -> int | None:
    """The first trained block among fewer: not the first one of all unless it was, never none."""
    if not first:
        return first
    return min(max(1, first * new_num_blocks // num_blocks), new_num_blocks - 1)
