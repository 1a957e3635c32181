"""What a recipe would train, without training: parameters per part, layout, batch arithmetic."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace

import torch

from megamm.config import ParallelConfig, Recipe
from megamm.engine import groups
from megamm.models.vlm import build_model, part_of
from megamm.recipe import validate_world


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part of the model, vocabulary padding left out."""

    total: int
    trainable: int


def parameter_counts(recipe: Recipe) -> dict[str, PartSize]:
    """Parameters per part ("vision", "connector", "language", "cross_attention"), from a model on the
    meta device: no memory is allocated for weights."""
    single = replace(recipe, parallel=ParallelConfig(backend="local"))
    layout = groups.initialize(single.parallel, torch.device("meta"), "gloo")
    with torch.device("meta"):
        model = build_model(single, layout, "local", image_token_id=0)[0]
    total: Counter[str] = Counter()
    trainable: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        total[part_of(name)] += parameter.numel()
        trainable[part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    return {part: PartSize(total[part], trainable[part]) for part in total}


def dry_run(recipe: Recipe) -> str:
    """The plan of a stage as text.

    Raises:
        InputError: the layout does not fit the number of processes or the batch.
    """
    parallel, training = recipe.parallel, recipe.training
    # without a launcher: as many processes as one copy of the model needs
    world = int(os.environ.get("WORLD_SIZE", parallel.tensor * parallel.pipeline))
    data_parallel = validate_world(recipe, world)
    accumulation = training.global_batch_size // (training.micro_batch_size * data_parallel)
    counts = parameter_counts(recipe)
    counts["all"] = PartSize(sum(s.total for s in counts.values()), sum(s.trainable for s in counts.values()))
    sequence = ", sequence parallel" if parallel.sequence else ""
    lines = [
        f"{recipe.name}, stage {recipe.stage}: {training.steps} steps",
        f"layout: {world} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data "
        f"{data_parallel}{sequence}",
        f"batch: {training.global_batch_size} samples = micro-batch {training.micro_batch_size} x data "
        f"{data_parallel} x accumulation {accumulation}",
    ]
    lines += [
        f"{part:>16}: {size.total:>18,} parameters, {size.trainable:>18,} trained"
        for part, size in counts.items()
    ]
    return "\n".join(lines)
