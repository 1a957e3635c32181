"""What the processes of the parity tests run: given weights on a given batch, in one layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.config import ParallelConfig, Recipe
from megamm.engine import groups
from megamm.engine.groups import Groups
from megamm.engine.optimizer import build_optimizer, wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from megamm.engine.weights import initialize, named_shards
from megamm.models.initialization import weight_drawer
from megamm.models.vlm import build_model


def run_cases(folder: str, tensor: int) -> dict[str, Any]:
    """Logits, loss and gradients of each case in `folder` (written by tests.parity.families)."""
    layout = groups.initialize(ParallelConfig(tensor=tensor), torch.device("cpu"), "gloo")
    results = {path.stem: _run(torch.load(path, weights_only=False), layout) for path in _cases(folder)}
    groups.shutdown()
    return results


def _cases(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.pt"))


def _run(case: dict[str, Any], layout: Groups) -> dict[str, Any]:
    recipe: Recipe = case["recipe"]
    parallel = ParallelConfig(tensor=layout.tp_size, distributed_optimizer=False)
    recipe = replace(recipe, parallel=parallel)
    models = build_model(recipe, layout, "local", case["image_id"])
    _fill(models, recipe, case["weights"])
    with torch.no_grad():
        logits = _gathered(models[0](case["batch"], return_logits=True), layout)
    wrapped = wrap_data_parallel(models, recipe, layout)
    build_optimizer(wrapped, recipe, layout)  # tells megatron's schedule how to finish gradients
    loss = forward_backward(wrapped, [case["batch"]], layout)
    shards = named_shards(models[0], lambda p: getattr(p, "main_grad", None))
    gradients = [(s.name, s.global_shape, s.index, s.data.clone()) for s in shards]
    return {"logits": logits, "loss": loss, "gradients": gradients}


def _fill(models: list[Any], recipe: Recipe, weights: Mapping[str, torch.Tensor]) -> None:
    """The given weights, padded where the layout pads the vocabulary; random ones for the rest."""
    draw = weight_drawer(recipe.model, recipe.seed)

    def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in weights:
            return draw(name, shape)
        padding = weights[name].new_zeros(shape[0] - len(weights[name]), *shape[1:])
        return torch.cat([weights[name], padding])

    initialize(models, weight)


def _gathered(logits: torch.Tensor, layout: Groups) -> torch.Tensor:
    group = layout.collection.tp
    pieces = [torch.empty_like(logits) for _ in range(group.size())]
    dist.all_gather(pieces, logits.contiguous(), group=group)
    return torch.cat(pieces, dim=-1)
