"""Media tokens travel between pipeline stages packed behind the hidden states, in the same tensor.

Every schedule of megatron-core sends one [S, B, H] tensor per micro-batch; with the media as further
rows of it, later stages can cross-attend and the gradients come back by themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def num_rows(num_tokens: int, width: int, hidden_size: int) -> int:
    """Rows of size `hidden_size` that hold `num_tokens` media tokens of size `width`."""
    return -(-num_tokens * width // hidden_size)


def pack(hidden: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
    """[S, B, H] and [M, B, W] to [S + rows, B, H]."""
    num_tokens, batch, width = media.shape
    hidden_size = hidden.shape[-1]
    flat = media.transpose(0, 1).reshape(batch, num_tokens * width)
    flat = F.pad(flat, (0, -flat.shape[1] % hidden_size))
    rows = flat.view(batch, -1, hidden_size).transpose(0, 1)
    return torch.cat([hidden, rows], dim=0)


def unpack(packed: torch.Tensor, num_tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack`: ([S, B, H], [M, B, W])."""
    rows = num_rows(num_tokens, width, packed.shape[-1])
    hidden, media = packed[:-rows], packed[-rows:]
    flat = media.transpose(0, 1).reshape(packed.shape[1], -1)[:, : num_tokens * width]
    return hidden, flat.view(packed.shape[1], num_tokens, width).transpose(0, 1)
