"""Learned position embeddings at another image size than they were trained at."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def resize_positions(embedding: torch.Tensor, side: int) -> torch.Tensor:
    """Interpolate the embeddings of a square of patches, bicubically in fp32; the class token's stays.

    The usual way to take a vision transformer to a higher resolution (Dosovitskiy et al. 2020, section 3.2).

    Args:
        embedding: [1 + g * g, W], the class token first.
        side: patches on a side of the image that is wanted.
    Returns:
        [1 + side * side, W], of the dtype of `embedding`.
    """
    old_side = math.isqrt(embedding.shape[0] - 1)
    if old_side == side:
        return embedding
    class_token, patches = embedding[:1], embedding[1:]
    square = patches.float().unflatten(0, (old_side, old_side)).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_token, resized[0].flatten(1).T.to(embedding.dtype)])
