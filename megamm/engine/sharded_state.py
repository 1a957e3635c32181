"""The sharded state dicts of models and optimizer: what megatron-core saves and loads."""

from __future__ import annotations

from typing import Any

from megamm.engine.groups import Groups
from megamm.engine.optimizer_state import optimizer_state

# Optimizer state is saved in the model's own shapes, so that any layout can load any other's.
# ("fully_sharded_model_space", megatron's default, is refused by its own loader in 0.16.)
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def _metadata(groups: Groups) -> dict[str, Any]:
    return {**CONTENT, "dp_cp_group": groups.collection.dp_cp}


def chunk_key(models: list[Any], index: int) -> str:
    """Where a sharded state dict has the `index`-th model chunk of this rank."""
    return f"model{index}" if len(models) > 1 else "model"


def model_state(models: list[Any], groups: Groups) -> dict[str, Any]:
    """The sharded state dicts of the unwrapped chunks of this rank."""
    metadata = _metadata(groups)
    return {
        chunk_key(models, i): model.sharded_state_dict(metadata=metadata) for i, model in enumerate(models)
    }


def state_to_save(models: list[Any], optimizer: Any, groups: Groups) -> dict[str, Any]:
    """Models and optimizer; the tensors are views of the live ones."""
    state = model_state(models, groups)
    return {**state, "optimizer": optimizer_state(optimizer, state, _metadata(groups))}


def state_to_load(models: list[Any], optimizer: Any, groups: Groups) -> dict[str, Any]:
    """Models and optimizer, to be filled from a checkpoint (collective)."""
    state = model_state(models, groups)
    loading = optimizer.sharded_state_dict(state, is_loading=True, metadata=_metadata(groups))
    return {**state, "optimizer": loading}
