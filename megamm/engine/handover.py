"""What one stage hands over to the next: weights, as they are or made anew, and the optimizer's state.

`open_stage` and `wanted_by` tell what is there and what is wanted. What is taken is decided elsewhere
(`megamm.training.handover`), before anything is loaded; `take_weights` and `take_optimizer` then load it,
from any parallel layout into any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megamm.config import Recipe
from megamm.engine.groups import Groups
from megamm.engine.loading import load_models, read_recipe, verify_shared_out
from megamm.engine.manifest import Manifest
from megamm.engine.optimizer_state import STATES, load_state
from megamm.engine.parameter_groups import has_frozen_rows
from megamm.engine.ranks import gather
from megamm.engine.restricted import read_index
from megamm.engine.sharded_files import load_sharded, tensors_of
from megamm.engine.sharded_state import model_state, state_to_load
from megamm.engine.weight_files import WeightFiles
from megamm.engine.weights import named_shards

Shape = tuple[int, ...]
Make = Callable[[Shape], torch.Tensor]  # a whole tensor of this shape (with the layout's vocabulary padding)


@dataclass(frozen=True)
class Stage:
    """A checkpoint that hands over.

    Attributes:
        weights: name -> whole shape of the model's tensors.
        moments: names of the weights that have all of the distributed optimizer's state.
    """

    path: Path
    manifest: Manifest
    recipe: Recipe
    weights: dict[str, Shape]
    moments: frozenset[str]

    def read(self) -> WeightFiles:
        """The weights as whole tensors, each read when it is asked for."""
        return WeightFiles(self.path / "shards")


@dataclass(frozen=True)
class Wanted:
    """The model that takes over, as all ranks together hold it.

    Attributes:
        shapes: name -> whole shape, with this layout's vocabulary padding.
        trained: names of what is trained now.
        by_rows: of these, those of which only some rows are.
    """

    shapes: dict[str, Shape]
    trained: frozenset[str]
    by_rows: frozenset[str]


def open_stage(checkpoint: Path) -> Stage:
    """A checkpoint with every byte verified (collective).

    Raises:
        InputError: it is damaged.
    """
    manifest = verify_shared_out(checkpoint)
    tensors = {name: shape for name, (shape, _) in tensors_of(read_index(checkpoint / "shards")).items()}
    weights = {name: shape for name, shape in tensors.items() if not name.startswith("optimizer.")}
    moments = {n for n in weights if all(f"optimizer.state.{kind}.{n}" in tensors for kind in STATES)}
    return Stage(checkpoint, manifest, read_recipe(checkpoint), weights, frozenset(moments))


def wanted_by(models: list[Any], groups: Groups) -> Wanted:
    """What the model of this run needs (collective)."""
    shapes: dict[str, Shape] = {}
    trained, by_rows = set(), set()
    for entry in nested_values(model_state(models, groups)):
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # extra state of backends
        is_factory = isinstance(entry, ShardedTensorFactory)
        for tensor in nested_values(entry.build()) if is_factory else [entry]:
            shapes[tensor.key] = tuple(tensor.global_shape)
            if entry.data.requires_grad:
                trained.add(tensor.key)
            if has_frozen_rows(entry.data):
                by_rows.add(tensor.key)
    everywhere = gather((shapes, trained, by_rows))
    return Wanted(
        {name: shape for part, _, _ in everywhere for name, shape in part.items()},
        frozenset(name for _, part, _ in everywhere for name in part),
        frozenset(name for _, _, part in everywhere for name in part),
    )


def take_weights(
    stage: Stage, models: list[Any], groups: Groups, as_they_are: Collection[str], made: Mapping[str, Make]
) -> None:
    """Fill weights of the models (collective); the others keep theirs.

    Args:
        as_they_are: names of tensors that both have, in the same shape.
        made: name -> what makes the whole tensor; each rank keeps its part of it.
    """
    state = model_state(models, groups)
    for chunk in state.values():
        others = [name for name, entry in chunk.items() if getattr(entry, "key", name) not in as_they_are]
        for name in others:
            del chunk[name]
    load_models(models, load_sharded(state, stage.path / "shards"), strict=False)
    with torch.no_grad():
        for model in models:
            _fill(model, made)


def _fill(model: torch.nn.Module, made: Mapping[str, Make]) -> None:
    name, whole = "", torch.empty(0)
    for shard in named_shards(model):
        if shard.name in made:
            if shard.name != name:  # gate and up of SwiGLU are two shards of one tensor
                name, whole = shard.name, made[shard.name](shard.global_shape)
            shard.data.copy_(whole[shard.index].reshape(shard.data.shape))


def take_optimizer(stage: Stage, models: list[Any], optimizer: Any, groups: Groups) -> None:
    """Fill the state of the distributed optimizer: moments, fp32 weights, number of steps (collective).

    Args:
        stage: has the state of every weight that is trained now.
    """
    state = {"optimizer": state_to_load(models, optimizer, groups)["optimizer"]}
    load_state(optimizer, load_sharded(state, stage.path / "shards")["optimizer"])
