"""The distributed optimizer's state as it lies on this rank, ready for a checkpoint of any layout.

megatron-core's `fully_reshardable` format stores optimizer state in the shapes of the parameters, which
any layout can read. To write it, megatron gathers every buffer on every data-parallel rank through several
copies on the host, and then lets one of them write: seconds of standing still for 100 M parameters. Here
each rank describes the stretch of each parameter that it owns as a few rectangular blocks, and writes
those: the same names and shapes in the files, no communication and no copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

_FORMAT = "fully_reshardable"
STATES = ("param", "exp_avg", "exp_avg_sq")

Block = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


def optimizer_state(optimizer: Any, model_state: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The sharded state dict of `optimizer`, to be saved; its tensors are views of the live state.

    Args:
        optimizer: megatron-core's, after at least one step.
        model_state: sharded state dict of the model, by chunk.
        metadata: of checkpoints, for optimizers that are not distributed.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    if len(parts) != 1 or not hasattr(parts[0], "gbuf_ranges"):
        state: dict[str, Any] = optimizer.sharded_state_dict(model_state, is_loading=False, metadata=metadata)
        return state
    (distributed,) = parts
    return {
        **distributed.state_dict(),
        "param_state": dict(enumerate(_param_states(distributed, model_state))),
        "param_state_sharding_type": _FORMAT,
    }


def groups_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The parameter groups in a state dict of megatron-core's optimizers."""
    # where fp32 weights are kept beside them, they are one level down
    groups: list[dict[str, Any]] = state.get("optimizer", state)["param_groups"]
    return groups


def load_state(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Fill `optimizer` with loaded state: moments, fp32 weights and the number of steps. Rates, decay and
    betas of the parameter groups stay those of the recipe, however the groups of the checkpoint were made.

    Args:
        optimizer: megatron-core's.
        loaded: what its sharded state dict has become; changed on the way.
    """
    state = loaded.get("optimizer", loaded)  # where fp32 weights are kept beside it, it is one level down
    state.setdefault("state", {})  # files have no empty ones, of ranks that train nothing
    there = state["param_groups"]
    steps = [group["step"] for group in there if "step" in group]
    own = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    parameters = [{"params": group["params"]} for group in there if "params" in group] or [{}] * len(own)
    state["param_groups"] = [
        {**group, **some, **({"step": steps[0]} if steps else {})}
        for group, some in zip(own, parameters, strict=True)
    ]
    optimizer.load_state_dict(loaded)


def _param_states(optimizer: Any, model_state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Per parameter of which this rank owns a stretch: kind of state -> the blocks of that stretch."""
    entries = {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    for parameter, owned in _owned_stretches(optimizer):
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        yield {
            kind: [
                _as_state(block, kind, optimizer.distributed_optimizer_instance_id)
                for shard, start in _shards(entries[id(parameter)])
                for block in _owned_blocks(shard, start, owned, states[kind].detach())
            ]
            for kind in STATES
        }


def _owned_stretches(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, range]]:
    """Parameters with the part of their elements, in row-major order, whose state this rank holds."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, range(ranges["param"].start, ranges["param"].end)


def _shards(entry: ShardedTensor | ShardedTensorFactory) -> Iterator[tuple[ShardedTensor, int]]:
    """The saved tensors that lie in a parameter (gate and up of SwiGLU are two), with the position of their
    first element in it."""
    shards = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    whole = entry.data
    for shard in shards:
        is_stretch = shard.data.is_contiguous() and shard.data.data_ptr() >= whole.data_ptr()
        if not is_stretch or shard.prepend_axis_num or not whole.is_contiguous():
            raise RuntimeError(f"{shard.key}: is not a stretch of its parameter's memory")
        yield shard, (shard.data.data_ptr() - whole.data_ptr()) // whole.element_size()


def _owned_blocks(
    shard: ShardedTensor, start: int, owned: range, values: torch.Tensor
) -> Iterator[ShardedTensor]:
    """The blocks of `shard` that this rank owns.

    Args:
        shard: a saved tensor, `start` elements into its parameter.
        owned: elements of the parameter that this rank owns.
        values: [len(owned)] their state.
    """
    first, end = max(owned.start, start), min(owned.stop, start + shard.data.numel())
    position = first - owned.start
    for offsets, sizes in blocks(first - start, end - start, tuple(shard.local_shape)):
        data = values[position : position + prod(sizes)].view(sizes)
        position += prod(sizes)
        yield replace(
            shard,
            data=data,
            dtype=data.dtype,
            local_shape=sizes,
            global_offset=tuple(a + b for a, b in zip(shard.global_offset, offsets, strict=True)),
            axis_fragmentations=None,  # blocks are no regular grid
        )


def blocks(start: int, end: int, shape: tuple[int, ...]) -> Iterator[Block]:
    """The rectangular blocks that make up elements `start` to `end` of a tensor in row-major order.

    Each block is contiguous, and they come in order: at most 2 per dimension, without the first, and one.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first_whole, end_whole = -(-start // row), end // row
    if first_whole > end_whole:  # within one row
        yield from _within_row(end_whole, start, end, shape)
        return
    yield from _within_row(first_whole - 1, start, first_whole * row, shape)
    if end_whole > first_whole:
        zeros = (0,) * (len(shape) - 1)
        yield (first_whole, *zeros), (end_whole - first_whole, *shape[1:])
    yield from _within_row(end_whole, end_whole * row, end, shape)


def _within_row(index: int, start: int, end: int, shape: tuple[int, ...]) -> Iterator[Block]:
    before = index * prod(shape[1:])
    for offsets, sizes in blocks(start - before, end - before, shape[1:]):
        yield (index, *offsets), (1, *sizes)


def _as_state(block: ShardedTensor, kind: str, instance: int) -> ShardedTensor:
    """The block under the name of the optimizer state; it exists once, whatever the data-parallel rank."""
    return replace(
        block,
        key=f"optimizer.state.{kind}.{block.key}",
        replica_id=(*block.replica_id[:2], instance),
    )
