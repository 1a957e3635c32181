"""Vision transformers of the CLIP family, plain PyTorch: CLIP (Radford et al. 2021), OpenCLIP (Cherti et al.
2022), EVA-CLIP (Sun et al. 2023) and its EVA-02 (Fang et al. 2023). What sets them apart are the keys of
`VisionConfig`.

Shapes: N images, P positions (class token + patches), W width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megamm.config import VisionConfig
from megamm.layers.linear import Linear
from megamm.models.vision.rotary import Rotation, patch_rotation, rotate_patches
from megamm.ops.attention import attention
from megamm.ops.layer_norm import LayerNorm
from megamm.ops.linear import linear
from megamm.ops.swiglu import swiglu


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "swiglu": swiglu,
}


def _norm(config: VisionConfig, present: bool = True, size: Optional[int] = None) -> nn.Module:
    """LayerNorm over `size` (the width unless given), or nothing."""
    return LayerNorm(size or config.width, eps=config.norm_eps) if present else nn.Identity()


class Attention(nn.Module):
    """Multi-head self-attention over all positions; queries, keys and values in one linear.

    EVA's keys have no bias: `q_bias` and `v_bias` are parameters, and the zeros between them stay zeros.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.keys_have_bias = config.qkv_bias == "all"
        self.qkv = Linear(config.width, 3 * config.width, bias=self.keys_have_bias)
        if not self.keys_have_bias:
            self.q_bias = nn.Parameter(torch.empty(config.width))
            self.v_bias = nn.Parameter(torch.empty(config.width))
        self.norm = _norm(config, config.sub_norm)
        self.proj = Linear(config.width, config.width)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        if self.keys_have_bias:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return linear(x, self.qkv.weight, bias)

    def forward(self, x: torch.Tensor, rotation: Optional[Rotation]) -> torch.Tensor:
        images, positions, width = x.shape
        qkv = self._project(x).view(images, positions, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate_patches(q, rotation), rotate_patches(k, rotation)
        out = attention(q, k, v)
        return self.proj(self.norm(out.transpose(1, 2).reshape(images, positions, width)))


class FeedForward(nn.Module):
    """Linear, activation, Linear; the first one holds gates and values if the activation is SwiGLU."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        gated = config.activation == "swiglu"
        self.fc1 = Linear(config.width, (2 if gated else 1) * config.mlp_width)
        self.norm = _norm(config, config.sub_norm, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.activation(self.fc1(x))))


class Block(nn.Module):
    """Residual block whose branches are normalised at their start, or at their end (EVA02-CLIP-E)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.pre_norm = config.residual == "pre_norm"
        self.norm1 = _norm(config)
        self.attention = Attention(config)
        self.norm2 = _norm(config)
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, rotation: Optional[Rotation] = None) -> torch.Tensor:
        if self.pre_norm:
            x = x + self.attention(self.norm1(x), rotation)
            return x + self.mlp(self.norm2(x))
        x = x + self.norm1(self.attention(x, rotation))
        return x + self.norm2(self.mlp(x))


class VisionTransformer(nn.Module):
    """Images to the features that the connector takes.

    All blocks and the last norm exist, so that published weights load and export completely; those
    behind the features that are taken are never run (`unused_modules`).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(
            3, config.width, config.patch_size, config.patch_size, bias=config.patch_bias
        )
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.position_embedding = nn.Parameter(torch.empty(1 + config.num_patches, config.width))
        self.pre_norm = _norm(config, config.pre_norm)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.post_norm = _norm(config, config.post_norm)
        # hidden states are [embeddings, block 1, ..., block L]
        self.num_used_blocks = range(config.num_layers + 1)[config.feature_layer]

    def unused_modules(self) -> list[nn.Module]:
        """Parts whose output is never used; they must not be trained (weight decay would shrink them)."""
        behind: list[nn.Module] = [*self.blocks[self.num_used_blocks :]]
        return behind if self.config.feature_norm else [*behind, self.post_norm]

    def forward(self, images: torch.Tensor, recompute: bool = False) -> torch.Tensor:
        """[N, 3, image_size, image_size] normalised images to [N, P, W] features.

        With `recompute`, only the inputs of the blocks are kept for the backward pass.
        """
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([class_token, x], dim=1) + self.position_embedding
        x = self.pre_norm(x)
        rotation = self._rotation(x.device)
        for block in self.blocks[: self.num_used_blocks]:
            x = checkpoint(block, x, rotation, use_reentrant=False) if recompute else block(x, rotation)
        if self.config.feature_norm:
            x = self.post_norm(x)
        return x[:, 1:] if self.config.feature_select == "patch" else x

    def _rotation(self, device: torch.device) -> Optional[Rotation]:
        c = self.config
        if c.rotary_side is None:
            return None
        return patch_rotation(c.image_size // c.patch_size, c.rotary_side, c.head_dim, device)
