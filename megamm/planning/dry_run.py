"""What a recipe would train, without training: parameters per part, layout, batch arithmetic, and what
single ranks would hold."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from megamm.config import ParallelConfig, Recipe
from megamm.models.freezing import part_of
from megamm.planning.parameters import HeldBytes, held_bytes
from megamm.planning.shard import (
    PartShard,
    RankShard,
    build_shard,
    check_rank,
    fake_model,
    first_rank_of_stage,
)
from megamm.recipe import validate_world

PARTS = ("vision", "connector", "language", "cross_attention")


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model, vocabulary padding left out."""

    total: int
    trainable: int


def parameter_counts(recipe: Recipe) -> dict[str, PartSize]:
    """Parameters per part ("vision", "connector", "language", "cross_attention") of the whole model, from
    one on the meta device: no memory is allocated for weights."""
    single = replace(recipe, parallel=ParallelConfig(backend="local"))
    total: Counter[str] = Counter()
    trainable: Counter[str] = Counter()
    with fake_model(single, world=1, rank=0) as (_, models):
        for name, parameter in models[0].named_parameters():
            total[part_of(name)] += parameter.numel()
            trainable[part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    return {part: PartSize(total[part], trainable[part]) for part in total}


def dry_run(recipe: Recipe, world: int | None = None, rank: int | None = None) -> str:
    """The plan of a stage as text; no other process is needed.

    Args:
        world: processes of the run; None: what a launcher announces, or hardware.gpus of the recipe, or as
            many as one copy of the model needs. Given without `rank`, the plan has a table of all pipeline
            stages.
        rank: whose shard of the model is described as well.
    Raises:
        InputError: the layout does not fit the number of processes or the batch, or there is no such rank.
    """
    parallel = recipe.parallel
    one_copy = parallel.tensor * parallel.pipeline * parallel.context
    processes = world or int(os.environ.get("WORLD_SIZE", recipe.hardware.gpus or one_copy))
    if rank is not None:
        check_rank(recipe, processes, rank)
    lines = _overview(recipe, processes)
    if rank is not None:
        lines += ["", *_rank_lines(recipe, build_shard(recipe, processes, rank))]
    elif world is not None:
        lines += ["", *_stage_lines(recipe, processes)]
    return "\n".join(lines)


def _overview(recipe: Recipe, world: int) -> list[str]:
    """The whole model, its layout and its batch."""
    parallel, training = recipe.parallel, recipe.training
    data_parallel = validate_world(recipe, world)
    accumulation = training.global_batch_size // (training.micro_batch_size * data_parallel)
    counts = parameter_counts(recipe)
    counts["all"] = PartSize(sum(s.total for s in counts.values()), sum(s.trainable for s in counts.values()))
    context = f" x context {parallel.context}" if parallel.context > 1 else ""
    sequence = ", sequence parallel" if parallel.sequence else ""
    lines = [
        f"{recipe.name}, stage {recipe.stage}: {training.steps} steps",
        f"layout: {world} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline}{context} "
        f"x data {data_parallel}{sequence}",
        f"batch: {training.global_batch_size} samples = micro-batch {training.micro_batch_size} x data "
        f"{data_parallel} x accumulation {accumulation}",
    ]
    return lines + [
        f"{part:>16}: {size.total:>18,} parameters, {size.trainable:>18,} trained"
        for part, size in counts.items()
    ]


def _rank_lines(recipe: Recipe, shard: RankShard) -> list[str]:
    """One rank: where it is, and what it holds of each part."""
    context = f"context {shard.context}, " if recipe.parallel.context > 1 else ""
    lines = [
        f"rank {shard.rank} of {shard.world}: tensor {shard.tensor}, pipeline stage {shard.pipeline}, "
        f"{context}data {shard.data} (all counted from 0)",
        f"holds {_contents(recipe, shard)}",
        _header("part"),
    ]
    lines += [_row(part, shard.parts[part]) for part in PARTS if part in shard.parts]
    return [
        *lines,
        _row("all", shard.all, shard.held),
        "all: with what fills up the buffers of gradients, and the piece of the optimizer that this rank has",
        _NOTE,
    ]


def _stage_lines(recipe: Recipe, world: int) -> list[str]:
    """One rank of each pipeline stage, and the one with most to hold."""
    stages = range(recipe.parallel.pipeline)
    shards = [build_shard(recipe, world, first_rank_of_stage(recipe, world, stage)) for stage in stages]
    held = [held_bytes(recipe, world, stage) for stage in stages]
    lines = [_header("stage  rank") + "  holds"]
    for shard in shards:
        place = f"{shard.pipeline:>5} {shard.rank:>5}"
        lines.append(f"{_row(place, shard.all, held[shard.pipeline])}  {_contents(recipe, shard)}")
    largest = max(stages, key=lambda stage: held[stage].total)
    return [
        *lines,
        f"no rank of a stage holds more; most, {_gib(held[largest].total)} GiB, those of stage "
        f"{largest} (rank {shards[largest].rank} and others)",
        _NOTE,
    ]


_NOTE = "GiB of weights, gradients and optimizer state; for activations, time and other layouts: megamm plan"


def _contents(recipe: Recipe, shard: RankShard) -> str:
    """What the rank computes, in words."""
    parts = ["vision, connector, embedding"] if shard.holds_embedding else []
    if shard.layers:
        ranges = " and ".join(_span(numbers) for numbers in shard.layers)
        parts.append(f"decoder layers {ranges} of {recipe.model.language.num_layers}")
    parts += ["output layer"] if shard.holds_output else []
    return ", ".join(parts) or "no layer"


def _span(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


_COLUMNS = ("parameters", "trained", "weights", "gradients", "optimizer", "together")
_WIDTHS = (16, 16, 9, 10, 10, 9)


def _header(first: str) -> str:
    return f"{first:>16}" + _aligned(_COLUMNS)


def _row(first: str, part: PartShard, held: HeldBytes | None = None) -> str:
    sizes = (part.weight_bytes, part.gradient_bytes, part.optimizer_bytes, part.all_bytes)
    if held is not None:
        sizes = (held.weights, held.gradients, held.optimizer, held.total)
    return f"{first:>16}" + _aligned((f"{part.total:,}", f"{part.trained:,}", *map(_gib, sizes)))


def _aligned(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
