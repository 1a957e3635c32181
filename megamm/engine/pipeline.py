"""Micro-batches through the layout by megatron-core's schedules: forward and backward over those of a step,
or forward alone, for logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

from megamm.batch import IGNORE_INDEX, Batch
from megamm.engine.gradient_flow import communicator
from megamm.engine.groups import Groups


def forward_backward(
    models: list[torch.nn.Module],
    batches: list[Batch],
    groups: Groups,
    forward_only: bool = False,
) -> float:
    """Run the micro-batches of a step; gradients are left in the models' gradient buffers, reduced over
    data parallelism and divided by the number of loss tokens of the global batch.

    Args:
        models: this rank's chunks, wrapped for data parallelism.
        batches: the micro-batches of this data-parallel rank.
        groups: process groups.
        forward_only: no backward pass.
    Returns:
        Mean cross entropy per token that carries loss, over the whole data-parallel group.
    """
    results = _run_schedule(models, batches, groups, _forward_step, forward_only=forward_only)
    return _reduce_loss(results, groups)


@torch.no_grad()
def labelled_logits(models: list[torch.nn.Module], batches: list[Batch], groups: Groups) -> torch.Tensor:
    """Next-token logits of one position of each row, computed by all ranks of a copy of the model together.

    Args:
        models: this rank's chunks, wrapped for data parallelism.
        batches: M micro-batches of one row each, all of the same length. In `labels`, the wanted position
            alone is not IGNORE_INDEX.
    Returns:
        [M, padded V] float32, the same on all ranks of the copy.
    """
    found = _run_schedule(
        models, batches, groups, _logits_step, forward_only=True, collect_non_loss_data=True
    )
    collection = groups.collection
    width = models[-1].module.language.vocab_size  # type: ignore[union-attr]
    logits = torch.zeros(len(batches), int(width), device=groups.device)  # type: ignore[arg-type]
    if groups.is_last_stage:
        mine = torch.cat(found).float()  # [M, V / tp]; zeros where another context rank has the position
        if collection.cp.size() > 1:
            dist.all_reduce(mine, group=collection.cp)
        parts = [torch.empty_like(mine) for _ in range(groups.tp_size)]
        if groups.tp_size > 1:
            dist.all_gather(parts, mine, group=collection.tp)
        else:
            parts = [mine]
        logits = torch.cat(parts, dim=-1)
    if groups.pp_size > 1:
        last = dist.get_global_rank(collection.pp, groups.pp_size - 1)
        dist.broadcast(logits, last, group=collection.pp)
    return logits


def _run_schedule(
    models: list[torch.nn.Module], batches: list[Batch], groups: Groups, forward_step: Any, **options: Any
) -> list[torch.Tensor]:
    """What `forward_step` leaves for each micro-batch, on the last stage."""
    iterators: Any = [iter(batches) for _ in models]
    unwrapped: Any = [model.module for model in models]
    micro_batch_size, sequence_length = batches[0].input_ids.shape
    between_stages = {}
    if groups.pp_size > 1:
        # the tensor between pipeline stages holds the media tokens behind the sequence
        sequence_length += unwrapped[0].pipeline_rows()
        between_stages = {
            "p2p_communicator": communicator(unwrapped, groups, len(batches)),
            "pg_collection": groups.collection,
        }
    results: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        **options,
        **between_stages,
    )
    return results


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    unwrapped: Any = model.module
    return model(batch), partial(_loss, unwrapped.own_labels(batch))


def _logits_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    unwrapped: Any = model.module
    return model(batch, return_logits=True), partial(_labelled, unwrapped.own_labels(batch))


def _labelled(labels: torch.Tensor, logits: torch.Tensor, non_loss_data: bool) -> torch.Tensor:
    """[B, V / tp] of the labelled position of each row; zeros where this rank's part of the row has none."""
    assert non_loss_data
    wanted = labels != IGNORE_INDEX
    found = logits.new_zeros(logits.shape[0], logits.shape[-1])
    found[wanted.nonzero()[:, 0]] = logits[wanted]
    return found


def _loss(labels: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of losses, number of loss tokens, both for the log); megatron divides by the global count."""
    carries_loss = labels != IGNORE_INDEX
    total = torch.where(carries_loss, losses.float(), 0.0).sum()
    count = carries_loss.sum()
    # megatron scales its loss tensor in place: the logged value needs memory of its own
    return total, count.int(), torch.stack([total.detach(), count.float()]).clone()


def _reduce_loss(results: list[torch.Tensor], groups: Groups) -> float:
    """Mean over the loss tokens of all micro-batches and data-parallel ranks; known on every rank."""
    total = torch.zeros(2, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage and groups.tp_rank == 0 and results:
        total += torch.stack(results).to(torch.float64).sum(dim=0)
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total[0] / total[1].clamp(min=1))
