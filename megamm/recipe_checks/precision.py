"""FP8: what can be said from the recipe alone. What the machine allows, `megamm.device` says at start.

FP8's kernels want matrices whose sides are multiples of 16 (cuBLAS; Transformer Engine asserts 8 for the
rows), or of the block that shares a scale: 32 values ("mxfp8"), and 128 ("blockwise") where blocks are
gathered over the tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megamm.config import Fp8Config, Recipe
from megamm.recipe_checks.data import sequence_lengths

_DELAYED_ONLY = ("amax_history", "amax_choice", "margin")


def check_precision(recipe: Recipe) -> Iterator[str]:
    """FP8's demands, where it is on."""
    scaling = recipe.training.fp8.scaling
    if scaling == "off":
        return
    key = f"training.fp8.scaling: {scaling}"
    if recipe.parallel.backend == "local":
        yield (
            f"{key} needs Transformer Engine, but parallel.backend is local; set parallel.backend=te, or "
            "training.fp8.scaling=off"
        )
    if recipe.training.precision != "bf16":
        yield (
            f"{key} goes with bf16, but training.precision is {recipe.training.precision}; set "
            "training.precision=bf16, or training.fp8.scaling=off"
        )
    if recipe.training.device == "cpu":
        yield (
            f"{key} needs a GPU, but training.device is cpu; set training.device=auto, or "
            "training.fp8.scaling=off"
        )
    yield from _keys_of_delayed(recipe.training.fp8)
    yield from _bf16_layers(recipe)
    yield from _features(recipe)
    yield from _rows(recipe)


def _keys_of_delayed(fp8: Fp8Config) -> Iterator[str]:
    if fp8.scaling == "delayed":
        return
    for field in fields(fp8):
        value = getattr(fp8, field.name)
        if field.name in _DELAYED_ONLY and value != field.default:
            yield (
                f"training.fp8.{field.name}: {value} means nothing with training.fp8.scaling {fp8.scaling}, "
                "only with delayed; remove it"
            )


def _bf16_layers(recipe: Recipe) -> Iterator[str]:
    fp8, num_layers = recipe.training.fp8, recipe.model.language.num_layers
    start, end = fp8.bf16_layers_at_start, fp8.bf16_layers_at_end
    if not start + end:
        return
    if fp8.scaling == "delayed":
        yield (
            f"training.fp8.bf16_layers_at_{'start' if start else 'end'}: {start or end} is not possible with "
            "delayed scaling, whose FP8 context spans all layers of a stage; set it to 0, or "
            "training.fp8.scaling=current"
        )
    if start + end >= num_layers:
        yield (
            f"training.fp8.bf16_layers_at_start: {start} and {end} at the end leave none of the {num_layers} "
            "decoder layers in FP8; lower them, or set training.fp8.scaling=off"
        )
    # megatron-core's limit, which takes stages as equally deep
    limit = num_layers // recipe.parallel.pipeline
    for name, value in (("start", start), ("end", end)):
        if value > limit:
            yield (
                f"training.fp8.bf16_layers_at_{name}: {value} are more than the {limit} decoder layers of a "
                "pipeline stage; lower it"
            )


def _features(recipe: Recipe) -> Iterator[str]:
    """The widths that linears have on one rank."""
    scaling, p, m = recipe.training.fp8.scaling, recipe.parallel, recipe.model.language
    block, kv_heads = 32 if scaling == "mxfp8" else 16, m.num_kv_heads or m.num_heads
    hidden_block = 128 if _gathers_blocks(recipe) else block
    heads, groups = m.num_heads * m.head_dim, kv_heads * m.head_dim
    widths = [
        ("model.language.hidden_size", m.hidden_size, hidden_block, 1),
        ("model.language.num_heads x head size", heads, block, p.tensor),
        ("queries, keys and values of model.language", heads + 2 * groups, block, p.tensor),
        ("model.language.ffn_hidden_size", m.ffn_hidden_size, block, p.tensor),
    ]
    if recipe.model.assembly == "cross_attention":
        c = recipe.model.cross_attention
        widths.append(("model.vision.width", recipe.model.vision.width, hidden_block, 1))
        if c.geometry == "flamingo":
            inner, ffn = c.num_heads * c.head_dim, c.ffn_multiple * m.hidden_size
            widths.append(("model.cross_attention.num_heads x head_dim", inner, block, p.tensor))
            widths.append(("model.cross_attention.ffn_multiple x hidden size", ffn, block, p.tensor))
    for name, width, multiple, ranks in widths:
        if width % (ranks * multiple):
            over = f" over parallel.tensor {ranks}" if ranks > 1 else ""
            remedy = f"{'lower parallel.tensor' if over else 'widen it'}, or set training.fp8.scaling=off"
            yield (
                f"{name}: {width} features{over} are not a multiple of {multiple} on each rank, which "
                f"training.fp8.scaling {scaling} needs; {remedy}"
            )


def _rows(recipe: Recipe) -> Iterator[str]:
    """The positions of a micro-batch that one rank has, and the media tokens that gated blocks attend to."""
    scaling, p, t = recipe.training.fp8.scaling, recipe.parallel, recipe.training
    block = 128 if _gathers_blocks(recipe) else 32 if scaling == "mxfp8" else 16
    shards = p.tensor if p.sequence else 1
    micro = t.micro_batch_size
    for key, length in sequence_lengths(recipe):
        if micro * length % (p.context * shards * block):
            split = p.context * shards
            over = f" over {split} ranks" if split > 1 else ""
            yield (
                f"{key}: {length} x training.micro_batch_size {micro}{over} is not a multiple of {block} "
                f"positions, which training.fp8.scaling {scaling} needs; change one of them"
            )
    if recipe.model.assembly == "cross_attention":
        latents, samples = recipe.model.connector.num_latents, 1 if recipe.data.pack else micro
        if latents * samples % (shards * block):
            over = f" over {shards} ranks" if shards > 1 else ""
            yield (
                f"model.connector.num_latents: {latents} x {samples} samples of a micro-batch{over} is not a "
                f"multiple of {block} media tokens, which training.fp8.scaling {scaling} needs; change one "
                "of them"
            )


def _gathers_blocks(recipe: Recipe) -> bool:
    """Whether blocks of 128 values are gathered in front of linears (sequence parallelism)."""
    return recipe.training.fp8.scaling == "blockwise" and recipe.parallel.sequence
