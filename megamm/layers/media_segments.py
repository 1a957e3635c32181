"""Attention of text to one image per position, segment by segment: no mask, no score that nobody wants.

Shapes: S positions, B samples, T images per sample (padded), L latents of an image, M = T * L media tokens.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Optional

import torch
import torch.nn.functional as F

from megamm.ops.media_segments import media_segments

# queries, keys, values, their two cumulative lengths, the longest of each
Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor
]
_KERNELS = (("torch.nn.attention.varlen", "varlen_attn"), ("flash_attn", "flash_attn_varlen_func"))


@dataclass(frozen=True)
class MediaSegments:
    """Which stretch of which sample attends to which image, for all gated blocks of a micro-batch.

    A sample has 2 T + 1 segments, alternately text that sees no image and the run of the next image; see
    ops.media_segments.

    Attributes:
        cu_seqlens_q: [B * (2 T + 1) + 1] int32, where the segments start among the B * S positions.
        cu_seqlens_k: likewise among the B * M media tokens.
        shape: (B, S).
        num_images: T.
        num_latents: L.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    shape: tuple[int, int]
    num_images: int
    num_latents: int

    @classmethod
    def of(cls, image: torch.Tensor, num_images: int, num_latents: int) -> MediaSegments:
        """From the image that each position sees, [B, S] from 1, 0 for none (layers.documents' last_image,
        or a context-parallel rank's part of it: whichever positions are left out, an image's stay side by
        side and the images in order)."""
        lengths = media_segments(image, num_images, num_latents)
        return cls(*lengths, (image.shape[0], image.shape[1]), num_images, num_latents)

    @cached_property
    def lengths(self) -> list[list[int]]:
        """Of each sample, the positions of its segments. Waits for the device if they lie on one."""
        return self._by_sample.tolist()

    @cached_property
    def sees_media(self) -> torch.Tensor:
        """[B, 1] bool: whether any position of a sample sees an image."""
        return (self._by_sample[:, 1::2] > 0).any(dim=1, keepdim=True)

    @property
    def _by_sample(self) -> torch.Tensor:
        return self.cu_seqlens_q.diff().view(self.shape[0], 2 * self.num_images + 1)


def attend_to_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: MediaSegments
) -> torch.Tensor:
    """[S, B, heads, d] queries over [M, B, heads, d] keys and values; 0 for positions without an image.

    Raises:
        ValueError: the segments are those of other shapes.
    """
    batch, num_positions = segments.shape
    num_tokens = segments.num_images * segments.num_latents
    if q.shape[:2] != (num_positions, batch) or k.shape[:2] != (num_tokens, batch):
        raise ValueError(
            f"segments of {num_positions} x {batch} positions and {num_tokens} media tokens, but queries are"
            f" {list(q.shape[:2])} and keys {list(k.shape[:2])}"
        )
    if (kernel := _kernel_for(q)) is None:
        samples = zip(q.unbind(1), k.unbind(1), v.unbind(1), segments.lengths, strict=True)
        return torch.stack([_one_by_one(*sample) for sample in samples], dim=1)
    # sample after sample, as the lengths count: a view where there is one sample (packed rows)
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    longest = num_positions, segments.num_latents
    out = kernel(q, k, v, segments.cu_seqlens_q, segments.cu_seqlens_k, *longest)
    return out.unflatten(0, (batch, num_positions)).transpose(0, 1)


def _kernel_for(q: torch.Tensor) -> Optional[Kernel]:
    """The variable-length attention for such queries, None if there is none."""
    head_dim = q.shape[-1]
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    return _installed_kernel() if q.is_cuda and is_half and head_dim % 8 == 0 and head_dim <= 256 else None


@cache
def _installed_kernel() -> Optional[Kernel]:
    """torch's own from 2.10 on, else flash-attn's; both take the same first seven arguments."""
    for module, name in _KERNELS:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            continue
    return None


def _one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One sample, [S, heads, d] over [M, heads, d]: one call per image that positions see."""
    runs = q.split(lengths)  # at the odd places those of the images
    keys, values = (x.unflatten(0, (len(runs) // 2, -1)).unbind() for x in (k, v))
    outputs = []
    for place, run in enumerate(runs):
        if place % 2 and len(run):
            heads_first = (x.transpose(0, 1)[None] for x in (run, keys[place // 2], values[place // 2]))
            outputs.append(F.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1))
        else:
            outputs.append(torch.zeros_like(run))
    if not any(lengths[1::2]):  # q, k and v stay in the graph, with gradients of 0
        outputs.append(q[:0] + k[:0] + v[:0])
    return torch.cat(outputs)
