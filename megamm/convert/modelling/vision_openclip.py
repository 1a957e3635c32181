"""CLIP's vision encoder (Radford et al. 2021) under open_clip's names.

Shapes: N images, P positions (class token, then patches), W width.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGelu(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class PackedAttention(nn.Module):
    """Self-attention; the parameters of queries, keys and values in one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in packed.chunk(3, dim=-1))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ResidualBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int, heads: int, inner: int, activation: nn.Module, eps: float) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width, eps=eps), PackedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=eps)
        layers = [("c_fc", nn.Linear(width, inner)), ("act", activation), ("c_proj", nn.Linear(inner, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    """All of them, under the name that they have in the weights."""

    def __init__(self, blocks: list[ResidualBlock]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class OpenClipVisionTransformer(nn.Module):
    """[N, 3, height, width] normalised images to the patches behind the last norm, [N, P - 1, W].

    `visual` has the keys of transformers' CLIPVisionConfig.
    """

    def __init__(self, visual: dict[str, Any]) -> None:
        super().__init__()
        width, patch_size, eps = visual["hidden_size"], visual["patch_size"], visual["layer_norm_eps"]
        positions = 1 + (visual["image_size"] // patch_size) ** 2
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(positions, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        heads, inner = visual["num_attention_heads"], visual["intermediate_size"]
        activation = QuickGelu if visual["hidden_act"] == "quick_gelu" else nn.GELU
        blocks = range(visual["num_hidden_layers"])
        self.transformer = Blocks([ResidualBlock(width, heads, inner, activation(), eps) for _ in blocks])

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], dim=1) + self.positional_embedding)
        return self.ln_post(self.transformer(x))[:, 1:]
