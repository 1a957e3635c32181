"""A replicated encoder that still scales with tensor parallelism: its images are dealt over the ranks.

Each tensor-parallel rank encodes its share of a micro-batch's images and the features are gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class _GatherFeatures(torch.autograd.Function):
    """[n, ...] features of each rank to [ranks * n, ...] on all of them."""

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        gathered = features.new_empty(group.size() * features.shape[0], *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # What follows is computed alike on every rank, so each already has the whole gradient: the own
        # share is a slice. The encoder's weight gradients are averaged over the ranks later
        # (share_gradients), although their sum is wanted; the factor makes up for it.
        rank, size = ctx.group.rank(), ctx.group.size()
        return grads[0].chunk(size)[rank] * size, None


def encode_dealt(
    encode: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, group: Any
) -> torch.Tensor:
    """`encode(images)` with the images dealt over `group`.

    Args:
        encode: [n, 3, h, w] images to [n, P, W] features.
        images: [N, 3, h, w], the same on every rank.
        group: tensor-parallel group.
    Returns:
        [N, P, W] features, the same on every rank.
    """
    size = group.size()
    if size == 1:
        return encode(images)
    num_images = images.shape[0]
    missing = -num_images % size
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    mine = images.chunk(size)[group.rank()]
    return _GatherFeatures.apply(encode(mine), group)[:num_images]


def share_gradients(encoder: torch.nn.Module) -> None:
    """Have megatron's finalize_model_grads average the encoder's gradients over the tensor-parallel ranks."""
    for parameter in encoder.parameters():
        parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
