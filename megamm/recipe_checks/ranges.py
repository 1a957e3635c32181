"""Numbers in range, names that are not empty."""

from __future__ import annotations

from collections.abc import Iterator

from megamm.config import Recipe
from megamm.recipe_checks.common import value_of

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
    "anomalies.spike_window",
    "anomalies.in_a_row",
    "watchdog.silent_s",
    "log.interval",
    "log.loss_half_life",
    "validation.batches",
    "validation.num_questions",
    "validation.max_new_tokens",
    "training.fp8.amax_history",
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
    "model.lora.alpha",
    "model.cross_attention.every",
    "model.cross_attention.num_heads",
    "model.cross_attention.head_dim",
    "model.cross_attention.ffn_multiple",
]
OPTIONAL_POSITIVE_KEYS = [
    "model.language.num_kv_heads",
    "model.language.sliding_window",
    "model.vision.rotary_side",
    "model.vision.weights_image_size",
    "optimizer.decay_steps",
    "parallel.virtual_pipeline",
    "training.recompute.layers",
    "hardware.gpus",
    "watchdog.stuck_s",
]
NOT_NEGATIVE_KEYS = [
    "seed",
    "data.max_images",
    "data.workers",
    "optimizer.min_lr",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "model.lora.rank",
    "checkpoint.interval",
    "checkpoint.keep_every",
    "checkpoint.max_failures",
    "validation.interval",
    "anomalies.max_rollbacks",
    "training.fp8.margin",
    "training.fp8.bf16_layers_at_start",
    "training.fp8.bf16_layers_at_end",
]


def check_ranges(recipe: Recipe) -> Iterator[str]:
    for key in POSITIVE_KEYS:
        if value_of(recipe, key) <= 0:
            yield f"{key}: {value_of(recipe, key)} is not positive; give a number above 0"
    for key in OPTIONAL_POSITIVE_KEYS:
        if (value := value_of(recipe, key)) is not None and value <= 0:
            yield f"{key}: {value} is not positive; give a number above 0 or null"
    for key in NOT_NEGATIVE_KEYS:
        if value_of(recipe, key) < 0:
            yield f"{key}: {value_of(recipe, key)} is negative; give 0 or more"
    yield from _shares(recipe)
    for key in ("name", "run_dir", "tokenizer", "stage"):
        if not value_of(recipe, key).strip():
            yield f"{key}: is empty; give it a value"


def _shares(recipe: Recipe) -> Iterator[str]:
    image, o = recipe.data.image, recipe.optimizer
    for key in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= value_of(recipe, key) < 1:
            yield f"{key}: {value_of(recipe, key)} is outside [0, 1); AdamW's usual values are 0.9 and 0.95"
    if not 0 <= recipe.data.max_bad_images <= 1:
        yield f"data.max_bad_images: {recipe.data.max_bad_images} is not a share; give 0 to 1"
    for key in ("anomalies.spike_factor", "watchdog.slow_factor"):
        if value_of(recipe, key) != 0 and value_of(recipe, key) <= 1:
            yield f"{key}: {value_of(recipe, key):g} is met all the time; give more than 1, or 0 for none"
    if not 0 < image.random_crop_scale <= 1:
        yield f"data.image.random_crop_scale: {image.random_crop_scale} is not in (0, 1]; 1.0 switches it off"
    for key in ("data.image.mean", "data.image.std"):
        if len(value_of(recipe, key)) != 3:
            yield f"{key}: {len(value_of(recipe, key))} values; give three, for red, green and blue"
    if min(image.std) <= 0:
        yield f"data.image.std: {min(image.std)} is not positive; give three numbers above 0"
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr: {o.min_lr:g} is above optimizer.lr {o.lr:g}; lower it"
