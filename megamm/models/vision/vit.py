"""Vision transformer of CLIP (Radford et al. 2021; Dosovitskiy et al. 2020), plain PyTorch.

Shapes: N images, P positions (class token + patches), W width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamm.config import VisionConfig


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    """Multi-head self-attention over all positions; queries, keys and values in one linear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images, positions, width = x.shape
        qkv = self.qkv(x).view(images, positions, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(images, positions, width))


class FeedForward(nn.Module):
    """Linear, activation, Linear."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images to the features that the connector takes.

    All blocks and the post-norm exist, so that published weights load and export completely; those
    behind `config.feature_layer` are never run (`unused_modules`).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(1 + config.num_patches, config.width))
        self.pre_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        # hidden states are [embeddings, block 1, ..., block L]
        self.num_used_blocks = range(config.num_layers + 1)[config.feature_layer]

    def unused_modules(self) -> list[nn.Module]:
        """Parts whose output is never used; they must not be trained (weight decay would shrink them)."""
        return [*self.blocks[self.num_used_blocks :], self.post_norm]

    def forward(self, images: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """[N, 3, image_size, image_size] normalised images to [N, P, W] features.

        With `recompute`, only the inputs of the blocks are kept for the backward pass.
        """
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.position_embedding
        x = self.pre_norm(x)
        for block in self.blocks[: self.num_used_blocks]:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x[:, 1:] if self.config.feature_select == "patch" else x
