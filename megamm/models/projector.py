"""LLaVA-1.5's connector (Liu et al. 2023, section 3.2): Linear, GELU, Linear on every patch feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megamm.layers.linear import Linear


class MLPProjector(nn.Module):
    """[N, P, vision width] features to [N, P, H] embeddings of the language model."""

    def __init__(self, vision_width: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = Linear(vision_width, hidden_size)
        self.linear_2 = Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))
