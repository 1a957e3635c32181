"""Two-dimensional rotary positions of image patches, as EVA-02 has them (Fang et al. 2023, section 2.1;
the rotation itself: Su et al. 2021).

Shapes: G patches on a side of the image, D head size; D is a multiple of 4.
"""

from __future__ import annotations

import torch

_THETA = 10000.0

Rotation = tuple[torch.Tensor, torch.Tensor]


def patch_rotation(side: int, reference_side: int, head_dim: int, device: torch.device) -> Rotation:
    """Cosines and sines for the patches of a square image.

    The first half of a head turns with the row of the patch, the second half with its column; neighbouring
    elements are a pair. Positions are scaled so that an image of any size spans `reference_side` of them.

    Returns:
        Two fp32 tensors [G * G, D].
    """
    half = head_dim // 2
    frequencies = _THETA ** -(torch.arange(0, half, 2, device=device, dtype=torch.float32) / half)
    positions = torch.arange(side, device=device, dtype=torch.float32) / side * reference_side
    angles = torch.outer(positions, frequencies).repeat_interleave(2, dim=-1)
    rows = angles[:, None].expand(side, side, half)
    columns = angles[None, :].expand(side, side, half)
    whole = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    return whole.cos(), whole.sin()


def rotate_patches(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Turn the queries or keys [N, heads, 1 + G * G, D] of all positions but the first, the class token."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    class_token, patches = x[:, :, :1], x[:, :, 1:]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return torch.cat([class_token, patches * cosine + turned * sine], dim=2)
