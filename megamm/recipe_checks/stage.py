"""Sequences, batches, and what is trained."""

from __future__ import annotations

from collections.abc import Iterator

from megamm.config import Recipe
from megamm.recipe_checks.common import divides
from megamm.recipe_checks.data import sequence_lengths


def check_sequence(recipe: Recipe) -> Iterator[str]:
    p = recipe.parallel
    for key, length in sequence_lengths(recipe):
        yield from _sequence(recipe, key, length)
    if p.sequence and p.tensor == 1:
        yield "parallel.sequence: needs parallel.tensor above 1; set parallel.sequence=false"


def _sequence(recipe: Recipe, key: str, length: int) -> Iterator[str]:
    model, p = recipe.model, recipe.parallel
    if length > model.language.max_positions:
        yield (
            f"{key}: {length} is more than model.language.max_positions "
            f"{model.language.max_positions}; shorten it or raise max_positions"
        )
    if model.tokens_per_image >= length:
        yield (
            f"{key}: {length} leaves no room for text beside the {model.tokens_per_image} "
            f"positions of one image; raise it or lower "
            f"model.{'connector.num_latents' if model.connector.kind == 'qformer' else 'vision.image_size'}"
        )
    if p.sequence:
        yield from divides(key, length, "parallel.tensor", p.tensor)
    if p.context > 1:  # each rank has an early and a late chunk, which sequence parallelism splits further
        parts = 2 * p.context * (p.tensor if p.sequence else 1)
        yield from divides(key, length, "the chunks of parallel.context", parts)


def check_batch(recipe: Recipe) -> Iterator[str]:
    t = recipe.training
    yield from divides(
        "training.global_batch_size", t.global_batch_size, "training.micro_batch_size", t.micro_batch_size
    )


def check_packing(recipe: Recipe) -> Iterator[str]:
    if recipe.data.pack and recipe.parallel.context > 1:
        yield (
            f"data.pack: the documents of a packed row cannot be split over parallel.context "
            f"{recipe.parallel.context}; set data.pack=false or parallel.context=1"
        )


def check_images(recipe: Recipe) -> Iterator[str]:
    data, key = recipe.data, "data.image.decode_device"
    if data.image.decode_device != "gpu":
        return
    if data.image.loader == "pillow":
        yield f"{key}: gpu is DALI's; set data.image.loader=dali or {key}=cpu"
    if data.workers:
        yield (
            f"{key}: gpu decodes in the training process, but data.workers is {data.workers}; set "
            f"data.workers=0 or {key}=cpu"
        )


def check_freeze(recipe: Recipe) -> Iterator[str]:
    if "cross_attention" in recipe.training.freeze and recipe.model.assembly == "merged":
        yield (
            "training.freeze: holds cross_attention, which a model with model.assembly merged does not "
            "have; remove it"
        )
    if "lora" in recipe.training.freeze and not recipe.model.lora.rank:
        yield "training.freeze: holds lora, but model.lora.rank is 0; remove it, or give a rank"
    yield from _unfreeze(recipe)
    yield from _new_tokens(recipe)
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


def _new_tokens(recipe: Recipe) -> Iterator[str]:
    key = "training.unfreeze.new_tokens"
    if not recipe.training.unfreeze.new_tokens:
        return
    if not recipe.model.language.added_vocab:
        yield (
            f"{key}: is true, but model.language.added_vocab is 0; give the number of added tokens, or set "
            f"{key} to false"
        )
    if "language" not in recipe.training.freeze:
        yield f"{key}: is true, but language is trained as a whole; add language to training.freeze"


def check_optimizer(recipe: Recipe) -> Iterator[str]:
    o, t = recipe.optimizer, recipe.training
    seen: set[str] = set()
    for part in o.parts:
        key = f"optimizer.parts: {part.part}"
        if part.part in seen:
            yield f"{key} is named twice; name each part once"
        seen.add(part.part)
        if part.part not in trainable_parts(recipe):
            yield f"{key} is not trained; remove it, or take {part.part} out of training.freeze"
        if part.lr is None and part.min_lr is None and part.weight_decay is None:
            yield f"{key} has no value of its own; give lr, min_lr or weight_decay, or remove it"
        for name in ("lr", "min_lr", "weight_decay"):
            value = getattr(part, name)
            if value is not None and (value < 0 or (name == "lr" and value == 0)):
                yield f"{key} has {name} {value:g}; give a number above 0"
        rate = o.lr if part.lr is None else part.lr
        if part.min_lr is not None and part.min_lr > rate:
            yield f"{key} has min_lr {part.min_lr:g}, which is above its lr {rate:g}; lower it"
    if t.init_optimizer == "keep" and t.init_from is None:
        yield (
            "training.init_optimizer: is keep, but training.init_from names no checkpoint to keep it from; "
            "name one, or set it to reset"
        )
    if t.init_optimizer == "keep" and not recipe.parallel.distributed_optimizer:
        yield (
            "training.init_optimizer: keep needs parallel.distributed_optimizer; set that to true, or "
            "training.init_optimizer to reset"
        )


def trainable_parts(recipe: Recipe) -> list[str]:
    """The parts of the model (names as in training.freeze) that this stage trains, wholly or partly."""
    parts = ["vision", "connector", "language"]
    if recipe.model.assembly == "cross_attention":
        parts.append("cross_attention")
    if recipe.model.lora.rank:
        parts.append("lora")
    unfreeze = recipe.training.unfreeze
    partly = {
        "vision": unfreeze.vision is not None,
        "language": unfreeze.language is not None or unfreeze.new_tokens,
    }
    return [part for part in parts if part not in recipe.training.freeze or partly.get(part)]


def warnings(recipe: Recipe) -> Iterator[str]:
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
    if recipe.model.lora.rank and "language" not in t.freeze:
        yield (
            "model.lora: the linears are trained themselves, so their adapters only cost memory; add "
            "language to training.freeze"
        )
    frozen_afresh = [p for p in ("vision", "language") if p in t.freeze]
    if frozen_afresh and t.init_from is None:
        yield (
            f"training.freeze: {' and '.join(frozen_afresh)} would stay at random weights, because "
            f"training.init_from is null; give a checkpoint to start from"
        )
