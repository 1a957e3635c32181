"""Sizes that divide, parts that fit together."""

from __future__ import annotations

from collections.abc import Iterator

from megamm.config import ModelConfig, Recipe
from megamm.recipe_checks.common import divides, value_of

# (key of the model, key that decides whether it has a meaning, the value it then has)
BELONGS_TO = [
    ("connector.activation", "connector.kind", "resampler"),
    ("connector.qk_norm", "connector.kind", "resampler"),
    ("connector.cross_every", "connector.kind", "qformer"),
    ("connector.flag_embeddings", "connector.kind", "qformer"),
    ("cross_attention.num_heads", "cross_attention.geometry", "flamingo"),
    ("cross_attention.head_dim", "cross_attention.geometry", "flamingo"),
    ("cross_attention.ffn_multiple", "cross_attention.geometry", "flamingo"),
    ("cross_attention.skip_text_only", "cross_attention.geometry", "flamingo"),
    ("cross_attention.qk_norm", "cross_attention.geometry", "idefics"),
    ("cross_attention.vector_gates", "cross_attention.geometry", "idefics"),
]
LANGUAGE_SIZES = ("num_layers", "hidden_size", "num_heads", "ffn_hidden_size", "vocab_size")
VISION_SIZES = ("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width")


def check_language(recipe: Recipe) -> Iterator[str]:
    m = recipe.model.language
    yield from _missing_sizes(recipe, "model.language", LANGUAGE_SIZES)
    yield from divides("model.language.hidden_size", m.hidden_size, "model.language.num_heads", m.num_heads)
    if m.num_kv_heads:
        yield from divides("model.language.num_heads", m.num_heads, "num_kv_heads", m.num_kv_heads)
    if m.head_dim % 2:
        yield (
            f"model.language: hidden_size {m.hidden_size} / num_heads {m.num_heads} = {m.head_dim} is odd, "
            f"and rotary positions need pairs; change num_heads"
        )
    if not 0 <= m.added_vocab < m.vocab_size:
        yield (
            f"model.language.added_vocab: {m.added_vocab} is no part of the {m.vocab_size} tokens of "
            f"vocab_size; give 0 or the number of added tokens"
        )
    if m.out_bias and not m.qkv_bias:
        yield "model.language.out_bias: needs qkv_bias as well; set both, or neither"


def check_vision(recipe: Recipe) -> Iterator[str]:
    v = recipe.model.vision
    yield from _missing_sizes(recipe, "model.vision", VISION_SIZES)
    yield from divides("model.vision.image_size", v.image_size, "model.vision.patch_size", v.patch_size)
    yield from divides("model.vision.width", v.width, "model.vision.num_heads", v.num_heads)
    if not -v.num_layers - 1 <= v.feature_layer <= v.num_layers:
        yield (
            f"model.vision.feature_layer: {v.feature_layer} is outside the {v.num_layers + 1} hidden states; "
            f"give {-v.num_layers - 1} to {v.num_layers}"
        )
    if v.weights_image_size is not None:
        key = "model.vision.weights_image_size"
        yield from divides(key, v.weights_image_size, "model.vision.patch_size", v.patch_size)
    if v.rotary_side is not None and v.head_dim % 4:
        yield (
            f"model.vision: width {v.width} / num_heads {v.num_heads} = {v.head_dim} is not divisible by 4, "
            f"and rotary positions need pairs for rows and for columns; change num_heads"
        )
    if v.feature_norm and not v.post_norm:
        yield "model.vision.feature_norm: needs the norm that is applied; set post_norm=true as well"


def check_assembly(recipe: Recipe) -> Iterator[str]:
    fitting = {"merged": ("mlp", "qformer"), "cross_attention": ("resampler",)}[recipe.model.assembly]
    if recipe.model.connector.kind not in fitting:
        yield (
            f"model.connector.kind: {recipe.model.connector.kind} does not fit model.assembly "
            f"{recipe.model.assembly}; use {' or '.join(fitting)}"
        )
    yield from _meaningless_keys(recipe)
    every, layers = recipe.model.cross_attention.every, recipe.model.language.num_layers
    flamingo = recipe.model.cross_attention.geometry == "flamingo"
    if recipe.model.assembly == "cross_attention" and flamingo and every > layers:
        yield (
            f"model.cross_attention.every: {every} is more than the {layers} layers, so images would "
            f"never be seen; give {layers} or less"
        )


def check_lora(recipe: Recipe) -> Iterator[str]:
    lora, m = recipe.model.lora, recipe.model.language
    if not lora.rank and lora.targets:
        yield (
            f"model.lora.targets: {', '.join(lora.targets)} would get no adapters, as model.lora.rank is 0; "
            f"give a rank, or remove the targets"
        )
    if lora.rank and not lora.targets:
        yield (
            f"model.lora.targets: is empty, so a rank of {lora.rank} has no effect; name linears such as "
            f"[q, v], or set model.lora.rank to 0"
        )
    if twice := [target for target in lora.targets if lora.targets.count(target) > 1]:
        yield f"model.lora.targets: names {twice[0]} twice; name each linear once"
    if lora.rank > m.hidden_size:
        yield (
            f"model.lora.rank: {lora.rank} is more than model.language.hidden_size {m.hidden_size}, the most "
            f"that a weight can have; lower it"
        )
    if not 0 <= lora.dropout < 1:
        yield f"model.lora.dropout: {lora.dropout} is outside [0, 1); usual are 0 to 0.1"


def _missing_sizes(recipe: Recipe, section: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if (value := value_of(recipe, f"{section}.{name}")) <= 0:
            yield f"{section}.{name}: is {value}; give {section}.preset or the size itself"


def _meaningless_keys(recipe: Recipe) -> Iterator[str]:
    """Keys that were set although the connector or the gated blocks of this recipe do not have them."""
    default = ModelConfig()
    for key, decider, needed in BELONGS_TO:
        value, kind = value_of(recipe.model, key), value_of(recipe.model, decider)
        if kind != needed and value != value_of(default, key):
            yield (
                f"model.{key}: {value} has no meaning with model.{decider} {kind}, only with {needed}; "
                f"remove it, or set model.{decider} to {needed}"
            )
