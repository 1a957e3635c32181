"""The vision encoders of EVA-CLIP (Sun et al. 2023; Fang et al. 2023) under their authors' names.

Shapes: N images, P positions (class token, then patches), W width, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-6


class EvaAttention(nn.Module):
    """Self-attention whose keys have no bias; optionally with a norm before its last linear."""

    def __init__(self, width: int, heads: int, sub_norm: bool) -> None:
        super().__init__()
        self.heads, self.separate = heads, sub_norm
        if sub_norm:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=_EPS) if sub_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        if self.separate:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (q + self.q_bias, k, v + self.v_bias)
        )
        if angles is not None:
            q, k = _turned(q, angles), _turned(k, angles)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(self.inner_attn_ln(out))


class EvaMlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, inner: int, sub_norm: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.ffn_ln = nn.LayerNorm(inner, eps=_EPS) if sub_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ffn_ln(F.gelu(self.fc1(x))))


class EvaSwiglu(nn.Module):
    """w3(norm(silu(w1 x) * w2 x))."""

    def __init__(self, width: int, inner: int, sub_norm: bool) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner), nn.Linear(inner, width)
        self.ffn_ln = nn.LayerNorm(inner, eps=_EPS) if sub_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class EvaBlock(nn.Module):
    """Residual block, normalised at the start of its branches or, with `post_norm`, at their end."""

    def __init__(self, width: int, heads: int, inner: int, visual: dict[str, Any]) -> None:
        super().__init__()
        sub_norm = bool(visual.get("subln", False))
        mlp = EvaSwiglu if visual.get("naiveswiglu", False) else EvaMlp
        self.post_norm = bool(visual.get("postnorm", False))
        self.norm1, self.attn = nn.LayerNorm(width, eps=_EPS), EvaAttention(width, heads, sub_norm)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=_EPS), mlp(width, inner, sub_norm)

    def forward(self, x: Tensor, angles: Tensor | None) -> Tensor:
        if self.post_norm:
            x = x + self.norm1(self.attn(x, angles))
            return x + self.norm2(self.mlp(x))
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """[N, 3, height, width] to [N, patches, W]."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class EvaVisionTransformer(nn.Module):
    """[N, 3, height, width] normalised images to what the last block gives, [N, P, W].

    `visual` has the keys of EVA-CLIP's model configurations. If `has_norm`, the weights have a norm behind
    the blocks, which is not applied.
    """

    def __init__(self, visual: dict[str, Any], has_norm: bool = True) -> None:
        super().__init__()
        width, head_width, patch_size = visual["width"], visual["head_width"], visual["patch_size"]
        inner = int(width * visual["mlp_ratio"])
        self.side, self.head_width = visual["image_size"] // patch_size, head_width
        self.reference_side = visual.get("pt_hw_seq_len", 16) if visual.get("rope", False) else None
        self.patch_embed = PatchEmbedding(width, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))
        heads = width // head_width
        self.blocks = nn.ModuleList(EvaBlock(width, heads, inner, visual) for _ in range(visual["layers"]))
        if has_norm:
            self.norm = nn.LayerNorm(width, eps=_EPS)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images.to(self.pos_embed.dtype))
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        angles = self._angles(x.device)
        for block in self.blocks:
            x = block(x, angles)
        return x

    def _angles(self, device: torch.device) -> Tensor | None:
        """[P - 1, D]: by how much each pair of neighbouring features of a patch is turned: by its row in the
        first half of a head, by its column in the second."""
        if self.reference_side is None:
            return None
        half = self.head_width // 2
        exponents = torch.arange(0, half, 2, device=device, dtype=torch.float32) / half
        places = torch.arange(self.side, device=device, dtype=torch.float32) / self.side * self.reference_side
        turns = (places[:, None] * 10000.0**-exponents).repeat_interleave(2, dim=1)  # [side, half]
        rows = turns.repeat_interleave(self.side, dim=0)
        return torch.cat([rows, turns.repeat(self.side, 1)], dim=1)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """[N, heads, P, D] with the patches turned, the class token left as it is."""
    patches = x[:, :, 1:]
    pairs = patches.unflatten(-1, (-1, 2))
    across = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    turned = patches * angles.cos().to(x.dtype) + across * angles.sin().to(x.dtype)
    return torch.cat([x[:, :, :1], turned], dim=2)
