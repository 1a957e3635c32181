"""Whether a recipe makes sense: sizes that divide, parts that fit, numbers in range.

`validate` needs the recipe alone; `validate_world` also needs the number of processes. Each check
is a generator of sentences that name the key, the numbers and the remedy; the first one is raised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

from megamm.config import ModelConfig, Recipe
from megamm.errors import InputError

POSITIVE_KEYS = [
    "data.sequence_length",
    "data.prefetch",
    "data.image.max_pixels",
    "data.image.num_workers",
    "training.steps",
    "training.global_batch_size",
    "training.micro_batch_size",
    "optimizer.lr",
    "optimizer.eps",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.timeout_s",
    "checkpoint.keep",
    "log.interval",
    "model.language.norm_eps",
    "model.language.rope_theta",
    "model.language.init_std",
    "model.language.max_positions",
    "model.vision.norm_eps",
    "model.vision.init_std",
    "model.connector.latent_std",
    "model.connector.num_latents",
    "model.connector.depth",
    "model.connector.num_heads",
    "model.connector.head_dim",
    "model.connector.ffn_multiple",
    "model.connector.cross_every",
    "model.cross_attention.every",
    "model.cross_attention.num_heads",
    "model.cross_attention.head_dim",
    "model.cross_attention.ffn_multiple",
]
OPTIONAL_POSITIVE_KEYS = [
    "model.language.num_kv_heads",
    "model.language.sliding_window",
    "optimizer.decay_steps",
    "parallel.virtual_pipeline",
    "training.recompute.layers",
]
NOT_NEGATIVE_KEYS = [
    "seed",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "checkpoint.interval",
]
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


def validate(recipe: Recipe) -> list[str]:
    """Check everything that does not depend on the number of processes.

    Returns:
        Warnings: sentences about settings that are legal but probably not meant.
    Raises:
        InputError: the first setting that cannot work, with its numbers and the remedy.
    """
    checks = (_ranges, _language, _vision, _assembly, _sequence, _layout, _batch, _packing, _freeze)
    for check in checks:
        for problem in check(recipe):
            raise InputError(problem)
    return list(_warnings(recipe))


def validate_world(recipe: Recipe, world_size: int) -> int:
    """Check the layout against the number of processes and return the data-parallel size.

    Raises:
        InputError: `world_size` does not fit the layout, or the batch does not fit `world_size`.
    """
    p, t = recipe.parallel, recipe.training
    model_parallel = p.tensor * p.pipeline * p.context
    if world_size % model_parallel:
        product = f"tensor {p.tensor} x pipeline {p.pipeline}" + (f" x context {p.context}" * (p.context > 1))
        raise InputError(
            f"parallel: {product} = {model_parallel} does not divide the {world_size} processes; start a "
            f"multiple of {model_parallel} or change parallel.tensor/pipeline"
        )
    data_parallel = world_size // model_parallel
    per_round = t.micro_batch_size * data_parallel
    if t.global_batch_size % per_round:
        raise InputError(
            f"training.global_batch_size: {t.global_batch_size} is not a multiple of micro_batch_size "
            f"{t.micro_batch_size} x data-parallel size {data_parallel} = {per_round}; "
            f"the next size that fits is {_next_multiple(t.global_batch_size, per_round)}"
        )
    num_micro = t.global_batch_size // per_round
    if (p.virtual_pipeline or 1) > 1 and num_micro % p.pipeline:
        raise InputError(
            f"parallel.virtual_pipeline: the interleaved schedule needs the {num_micro} micro-batches of a "
            f"step to be a multiple of parallel.pipeline {p.pipeline}; change training.global_batch_size "
            f"or training.micro_batch_size"
        )
    return data_parallel


def _value(section: Recipe | ModelConfig, dotted: str) -> Any:
    return reduce(getattr, dotted.split("."), section)


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _divides(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    if value % by:
        yield (
            f"{key}: {value} is not divisible by {by_key} {by}; "
            f"change {by_key} or take {_next_multiple(value, by)}"
        )


def _ranges(recipe: Recipe) -> Iterator[str]:
    for key in POSITIVE_KEYS:
        if _value(recipe, key) <= 0:
            yield f"{key}: {_value(recipe, key)} is not positive; give a number above 0"
    for key in OPTIONAL_POSITIVE_KEYS:
        if (value := _value(recipe, key)) is not None and value <= 0:
            yield f"{key}: {value} is not positive; give a number above 0 or null"
    for key in NOT_NEGATIVE_KEYS:
        if _value(recipe, key) < 0:
            yield f"{key}: {_value(recipe, key)} is negative; give 0 or more"
    yield from _shares(recipe)
    for key in ("name", "run_dir", "tokenizer", "stage"):
        if not _value(recipe, key).strip():
            yield f"{key}: is empty; give it a value"


def _shares(recipe: Recipe) -> Iterator[str]:
    image, o = recipe.data.image, recipe.optimizer
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= _value(recipe, key) < 1:
            yield f"{key}: {_value(recipe, key)} is outside [0, 1); AdamW's usual values are 0.9 and 0.95"
    if not 0 <= recipe.data.max_bad_images <= 1:
        yield f"data.max_bad_images: {recipe.data.max_bad_images} is not a share; give 0 to 1"
    if not 0 < image.random_crop_scale <= 1:
        yield f"data.image.random_crop_scale: {image.random_crop_scale} is not in (0, 1]; 1.0 switches it off"
    for key in ("data.image.mean", "data.image.std"):
        if len(_value(recipe, key)) != 3:
            yield f"{key}: {len(_value(recipe, key))} values; give three, for red, green and blue"
    if min(image.std) <= 0:
        yield f"data.image.std: {min(image.std)} is not positive; give three numbers above 0"
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr: {o.min_lr:g} is above optimizer.lr {o.lr:g}; lower it"


def _missing_sizes(recipe: Recipe, section: str, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if (value := _value(recipe, f"{section}.{name}")) <= 0:
            yield f"{section}.{name}: is {value}; give {section}.preset or the size itself"


def _language(recipe: Recipe) -> Iterator[str]:
    m = recipe.model.language
    yield from _missing_sizes(recipe, "model.language", LANGUAGE_SIZES)
    yield from _divides("model.language.hidden_size", m.hidden_size, "model.language.num_heads", m.num_heads)
    if m.num_kv_heads:
        yield from _divides("model.language.num_heads", m.num_heads, "num_kv_heads", m.num_kv_heads)
    if m.head_dim % 2:
        yield (
            f"model.language: hidden_size {m.hidden_size} / num_heads {m.num_heads} = {m.head_dim} is odd, "
            f"and rotary positions need pairs; change num_heads"
        )
    if m.out_bias and not m.qkv_bias:
        yield "model.language.out_bias: needs qkv_bias as well; set both, or neither"


def _vision(recipe: Recipe) -> Iterator[str]:
    v = recipe.model.vision
    yield from _missing_sizes(recipe, "model.vision", VISION_SIZES)
    yield from _divides("model.vision.image_size", v.image_size, "model.vision.patch_size", v.patch_size)
    yield from _divides("model.vision.width", v.width, "model.vision.num_heads", v.num_heads)
    if not -v.num_layers - 1 <= v.feature_layer <= v.num_layers:
        yield (
            f"model.vision.feature_layer: {v.feature_layer} is outside the {v.num_layers + 1} hidden states; "
            f"give {-v.num_layers - 1} to {v.num_layers}"
        )


def _assembly(recipe: Recipe) -> Iterator[str]:
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


def _meaningless_keys(recipe: Recipe) -> Iterator[str]:
    """Keys that were set although the connector or the gated blocks of this recipe do not have them."""
    default = ModelConfig()
    for key, decider, needed in BELONGS_TO:
        value, kind = _value(recipe.model, key), _value(recipe.model, decider)
        if kind != needed and value != _value(default, key):
            yield (
                f"model.{key}: {value} has no meaning with model.{decider} {kind}, only with {needed}; "
                f"remove it, or set model.{decider} to {needed}"
            )


def _sequence(recipe: Recipe) -> Iterator[str]:
    length, model, p = recipe.data.sequence_length, recipe.model, recipe.parallel
    if length > model.language.max_positions:
        yield (
            f"data.sequence_length: {length} is more than model.language.max_positions "
            f"{model.language.max_positions}; shorten it or raise max_positions"
        )
    if model.tokens_per_image >= length:
        yield (
            f"data.sequence_length: {length} leaves no room for text beside the {model.tokens_per_image} "
            f"positions of one image; raise it or lower "
            f"model.{'connector.num_latents' if model.connector.kind == 'qformer' else 'vision.image_size'}"
        )
    if p.sequence and p.tensor == 1:
        yield "parallel.sequence: needs parallel.tensor above 1; set parallel.sequence=false"
    if p.sequence:
        yield from _divides("data.sequence_length", length, "parallel.tensor", p.tensor)
    if p.context > 1:  # each rank has an early and a late chunk, which sequence parallelism splits further
        parts = 2 * p.context * (p.tensor if p.sequence else 1)
        yield from _divides("data.sequence_length", length, "the chunks of parallel.context", parts)


def _layout(recipe: Recipe) -> Iterator[str]:
    p, m, model = recipe.parallel, recipe.model.language, recipe.model
    split = [
        ("model.language.num_heads", m.num_heads),
        ("model.language.num_kv_heads", m.num_kv_heads or m.num_heads),
        ("model.language.ffn_hidden_size", m.ffn_hidden_size),
        ("model.language.hidden_size", m.hidden_size),
    ]
    c = model.connector
    if model.assembly == "cross_attention" and model.cross_attention.geometry == "flamingo":
        split += [("model.cross_attention.num_heads", model.cross_attention.num_heads)]
    if c.kind in ("resampler", "qformer"):
        split += [("model.connector.num_heads", c.num_heads)]
    if c.kind == "resampler":
        inner = model.vision.width * c.ffn_multiple
        split += [("model.vision.width x model.connector.ffn_multiple", inner)]
    for key, value in split:
        if value % p.tensor:
            yield (
                f"{key}: {value} is not divisible by parallel.tensor {p.tensor}; "
                f"use a parallel.tensor that divides {value}"
            )
    latents = model.connector.num_latents
    if p.sequence and model.assembly == "cross_attention" and latents % p.tensor:
        yield (
            f"model.connector.num_latents: {latents} is not divisible by parallel.tensor {p.tensor}, which "
            f"parallel.sequence needs; use a multiple of {p.tensor}"
        )
    chunks = p.pipeline * (p.virtual_pipeline or 1)
    if (p.virtual_pipeline or 1) > 1 and p.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: {p.virtual_pipeline} needs parallel.pipeline above 1; "
            f"set it to null or use pipeline stages"
        )
    if p.pipeline_layout is not None:
        yield from _pipeline_layout(p.pipeline_layout, chunks, m.num_layers)
    elif m.num_layers % chunks:
        yield (
            f"model.language.num_layers: {m.num_layers} is not divisible by parallel.pipeline {p.pipeline} x "
            f"virtual_pipeline {p.virtual_pipeline or 1} = {chunks}; use stages that divide {m.num_layers}, "
            f"or say in parallel.pipeline_layout which stage holds how many"
        )


def _pipeline_layout(layout: str, num_chunks: int, num_layers: int) -> Iterator[str]:
    """Whether a layout like "Ett|t*3|tL" is one of these chunks and layers."""
    key = f"parallel.pipeline_layout: {layout!r}"
    if not re.fullmatch(r"E(t(\*\d+)?|\|)*L", layout):
        yield f"{key} is not E (embedding), t or t*N (layers), | (between stages), L (output) in that order"
        return
    stages = layout.count("|") + 1
    if stages != num_chunks:
        yield (
            f"{key} has {stages} stages, but parallel.pipeline x virtual_pipeline is {num_chunks}; "
            f"separate {num_chunks} of them by |"
        )
    layers = sum(int(times or 1) for times in re.findall(r"t(?:\*(\d+))?", layout))
    if layers != num_layers:
        yield f"{key} has {layers} layers, but model.language.num_layers is {num_layers}; make them agree"


def _batch(recipe: Recipe) -> Iterator[str]:
    t = recipe.training
    yield from _divides(
        "training.global_batch_size", t.global_batch_size, "training.micro_batch_size", t.micro_batch_size
    )


def _packing(recipe: Recipe) -> Iterator[str]:
    if recipe.data.pack and recipe.parallel.context > 1:
        yield (
            f"data.pack: the documents of a packed row cannot be split over parallel.context "
            f"{recipe.parallel.context}; set data.pack=false or parallel.context=1"
        )


def trainable_parts(recipe: Recipe) -> list[str]:
    """The parts of the model (names as in training.freeze) that this stage trains, wholly or partly."""
    parts = ["vision", "connector", "language"]
    if recipe.model.assembly == "cross_attention":
        parts.append("cross_attention")
    unfreeze = recipe.training.unfreeze
    partly = {"vision": unfreeze.vision is not None, "language": unfreeze.language is not None}
    return [part for part in parts if part not in recipe.training.freeze or partly.get(part)]


def _freeze(recipe: Recipe) -> Iterator[str]:
    if "cross_attention" in recipe.training.freeze and recipe.model.assembly == "merged":
        yield (
            "training.freeze: holds cross_attention, which a model with model.assembly merged does not "
            "have; remove it"
        )
    yield from _unfreeze(recipe)
    if not trainable_parts(recipe):
        yield "training.freeze: every part is frozen, so nothing would be trained; remove one"


def _unfreeze(recipe: Recipe) -> Iterator[str]:
    vision = recipe.model.vision
    used_blocks = range(vision.num_layers + 1)[vision.feature_layer]
    blocks = {"vision": used_blocks, "language": recipe.model.language.num_layers}
    for part, num_blocks in blocks.items():
        first = getattr(recipe.training.unfreeze, part)
        if first is None:
            continue
        key = f"training.unfreeze.{part}"
        if part not in recipe.training.freeze:
            yield f"{key}: is {first}, but {part} is trained as a whole; add {part} to training.freeze"
        elif not 0 <= first < num_blocks:
            yield f"{key}: {first} is not one of the {num_blocks} blocks in use; give 0 to {num_blocks - 1}"


def _warnings(recipe: Recipe) -> Iterator[str]:
    o, t = recipe.optimizer, recipe.training
    decay_key = "training.steps" if o.decay_steps is None else "optimizer.decay_steps"
    decay = t.steps if o.decay_steps is None else o.decay_steps
    if o.warmup_steps and o.warmup_steps >= decay:
        reached = o.lr * min(1.0, t.steps / o.warmup_steps)
        yield (
            f"optimizer.warmup_steps: the {o.warmup_steps} steps of warm-up do not end before {decay_key} "
            f"{decay}, so the rate never decays and reaches {reached:.3g} instead of {o.lr:g}"
        )
    if o.decay_steps is not None and o.decay_steps < t.steps:
        yield (
            f"optimizer.decay_steps: {o.decay_steps} is less than training.steps {t.steps}; the last "
            f"{t.steps - o.decay_steps} steps run at min_lr {o.min_lr:g}"
        )
    frozen_afresh = [p for p in ("vision", "language") if p in t.freeze]
    if frozen_afresh and t.init_from is None:
        yield (
            f"training.freeze: {' and '.join(frozen_afresh)} would stay at random weights, because "
            f"training.init_from is null; give a checkpoint to start from"
        )
