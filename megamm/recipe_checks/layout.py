"""Parallel layouts: what the model, the batch and the number of processes allow."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megamm.config import Recipe
from megamm.errors import InputError
from megamm.recipe_checks.common import next_multiple


def check_layout(recipe: Recipe) -> Iterator[str]:
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


def validate_world(recipe: Recipe, world_size: int) -> int:
    """Check the layout against the number of processes and return the data-parallel size.

    Raises:
        InputError: `world_size` does not fit the layout, or the batch does not fit `world_size`.
    """
    p, t = recipe.parallel, recipe.training
    if (alone := recipe.model.assembly) in ("language", "vision"):
        raise InputError(f"model.assembly: {alone} alone is not trained; set merged or cross_attention")
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
            f"the next size that fits is {next_multiple(t.global_batch_size, per_round)}"
        )
    num_micro = t.global_batch_size // per_round
    if (p.virtual_pipeline or 1) > 1 and num_micro % p.pipeline:
        raise InputError(
            f"parallel.virtual_pipeline: the interleaved schedule needs the {num_micro} micro-batches of a "
            f"step to be a multiple of parallel.pipeline {p.pipeline}; change training.global_batch_size "
            f"or training.micro_batch_size"
        )
    return data_parallel
