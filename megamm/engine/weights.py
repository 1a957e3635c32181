"""A model's parameters under their checkpoint names, as slices of whole tensors, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


@dataclass(frozen=True)
class Shard:
    """This rank's piece of one parameter.

    Attributes:
        name: checkpoint key.
        global_shape: of the whole tensor (with this layout's vocabulary padding).
        index: where the piece lies in the whole tensor.
        data: the piece; a view, so that writing to it changes the model (or its gradient).
    """

    name: str
    global_shape: tuple[int, ...]
    index: tuple[slice, ...]
    data: torch.Tensor


def named_shards(
    model: torch.nn.Module, select: Callable[[torch.nn.Parameter], torch.Tensor | None] | None = None
) -> Iterator[Shard]:
    """The shards of all parameters of a model chunk.

    Args:
        model: a chunk built by models.build_model (unwrapped).
        select: another tensor of the parameter's shape to slice instead (its gradient, say); None from
            it leaves the parameter out.
    """
    parameters = {p.data_ptr(): p for p in model.parameters()}
    for entry in nested_values(model.sharded_state_dict()):  # type: ignore[operator]
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
            continue  # extra state of backends
        if select is not None:
            value = select(parameters[entry.data.data_ptr()])
            if value is None:
                continue
            entry = replace(entry, data=value.view(entry.data.shape))
        yield from _shards_of(entry)


def _shards_of(entry: Any) -> Iterator[Shard]:
    # a factory describes one parameter that is saved as several tensors (gate and up of SwiGLU)
    tensors = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for tensor in tensors:
        index = tensor.global_slice()
        yield Shard(
            name=tensor.key,
            global_shape=tuple(tensor.global_shape),
            index=index,
            data=tensor.data,
        )


@torch.no_grad()
def initialize(models: list[torch.nn.Module], draw: Callable[[str, tuple[int, ...]], torch.Tensor]) -> None:
    """Fill all parameters: `draw(name, global_shape)` gives the whole tensor, each rank keeps its slice."""
    for model in models:
        for shard in named_shards(model):
            whole = draw(shard.name, shard.global_shape)
            piece = whole[shard.index].to(shard.data.dtype)
            shard.data.copy_(piece.reshape(shard.data.shape))
