"""What a recipe would train, without training: parameters per part, layout, batch arithmetic."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from megamm.config import ParallelConfig, Recipe
from megamm.engine import groups
from megamm.models.vlm import build_model, part_of


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
    """The plan of a stage as text."""
    world, parallel, training = groups.world_size(), recipe.parallel, recipe.training
    data_parallel = max(1, world // (parallel.tensor * parallel.pipeline))
    per_rank = training.global_batch_size // (training.micro_batch_size * data_parallel)
    counts = parameter_counts(recipe)
    lines = [f"{recipe.name}, stage {recipe.stage}: {training.steps} steps of {training.global_batch_size} samples"]
    lines.append(
        f"layout: {world} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data_parallel}"
        f"{', sequence parallel' if parallel.sequence else ''}; batch {training.global_batch_size} = micro "
        f"{training.micro_batch_size} x data {data_parallel} x accumulation {per_rank}"
    )
    lines += [f"{part:>16}: {size.total:>18,} parameters, {size.trainable:>18,} trained" for part, size in counts.items()]
    total, trained = sum(s.total for s in counts.values()), sum(s.trainable for s in counts.values())
    lines.append(f"{'all':>16}: {total:>18,} parameters, {trained:>18,} trained")
    return "\n".join(lines)
