"""Context parallelism: one sequence over several ranks, balanced for causal attention.

The sequence is cut into 2 C chunks for C ranks, and rank r has chunks r and 2 C - 1 - r: a late chunk, which
attends to much, goes with an early one. This is megatron-core's and Transformer Engine's order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def context_slice(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """This rank's part of a tensor that has the whole sequence along `dim`."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return x
    chunks = x.chunk(2 * size, dim)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]], dim)


def context_gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The whole sequence, from each rank's part of it along dimension 0; gradients are summed."""
    return x if group.size() == 1 else _Gather.apply(x, group)


def context_chunks(group: Any) -> tuple[int, int]:
    """Which of the 2 C chunks this rank has."""
    return group.rank(), 2 * group.size() - 1 - group.rank()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        chunks = gathered.chunk(2 * group.size())
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        chunks = grads[0].chunk(2 * size)
        # back into the order of the ranks: each one's early chunk, then its late one
        by_rank = [chunk for rank in range(size) for chunk in (chunks[rank], chunks[2 * size - 1 - rank])]
        mine = grads[0].new_empty(grads[0].shape[0] // size, *grads[0].shape[1:])
        dist.reduce_scatter_tensor(mine, torch.cat(by_rank), group=ctx.group)
        return mine, None
