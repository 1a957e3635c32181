"""A Flamingo in plain PyTorch with a dense mask over all media, as training scripts commonly have it: what
megamm's Flamingo-style model is measured against.

Weights have megamm's names and shapes (one tensor-parallel rank), so that both sides start from the same.
Shapes: B samples, S positions, N images, T images of a sample at most, L latents, H hidden size, W media
width."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import ModelConfig


def heads_of(x: Tensor, count: int) -> Tensor:
    """[B, S, heads * d] to [B, heads, S, d]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, heads, S, d] to [B, S, heads * d]."""
    return x.transpose(1, 2).flatten(2)


class RMSNorm(nn.Module):
    """As Hugging Face's LLaMA has it."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight


class EncoderBlock(nn.Module):
    """A block of CLIP's vision transformer."""

    def __init__(self, width: int, num_heads: int, mlp_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp_width), "fc2": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            heads_of(part, self.num_heads) for part in self.attention["qkv"](self.norm1(x)).chunk(3, -1)
        )
        x = x + self.attention["proj"](joined(F.scaled_dot_product_attention(q, k, v)))
        hidden = self.mlp["fc1"](self.norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))


class Encoder(nn.Module):
    """Images [N, 3, h, w] to the patch features of the last block but one, [N, P, W]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.width))
        self.position_embedding = nn.Parameter(torch.zeros(1 + config.num_patches, config.width))
        self.pre_norm, self.post_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        sizes = config.width, config.num_heads, config.mlp_width
        self.blocks = nn.ModuleList(EncoderBlock(*sizes) for _ in range(config.num_layers))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.position_embedding
        x = self.pre_norm(x)
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return x[:, 1:]


class MediaAttention(nn.Module):
    """Queries from one sequence, keys and values (head by head) from another."""

    def __init__(self, width: int, media_width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, num_heads * head_dim, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * num_heads * head_dim, bias=False)
        self.to_out = nn.Linear(num_heads * head_dim, width, bias=False)

    def forward(self, x: Tensor, media: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` is [B, 1, S, T * L] bool; a position that sees nothing gets 0."""
        q = heads_of(self.to_q(x), self.num_heads)
        k, v = heads_of(self.to_kv(media), self.num_heads).chunk(2, dim=-1)
        if mask is None:
            return self.to_out(joined(F.scaled_dot_product_attention(q, k, v)))
        sees = mask.any(dim=-1, keepdim=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees)
        return self.to_out(joined(out * sees.to(out.dtype)))


class FeedForward(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, multiple: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, multiple * width, bias=False)
        self.linear_2 = nn.Linear(multiple * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class ResamplerLayer(nn.Module):
    """Latents attend to features and latents, then a feed-forward."""

    def __init__(self, width: int, connector: Any) -> None:
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MediaAttention(width, width, connector.num_heads, connector.head_dim)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, connector.ffn_multiple)

    def forward(self, latents: Tensor, features: Tensor) -> Tensor:
        queries = self.norm_latents(latents)
        latents = latents + self.attention(queries, torch.cat([self.norm_media(features), queries], dim=1))
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class Resampler(nn.Module):
    """[N, P, W] to [N, L, W]."""

    def __init__(self, width: int, connector: Any) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(connector.num_latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(width, connector) for _ in range(connector.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        latents = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(latents, features)
        return self.norm(latents)


class GatedBlock(nn.Module):
    """x + tanh(gate) attention, then x + tanh(gate) feed-forward."""

    def __init__(self, width: int, media_width: int, geometry: Any) -> None:
        super().__init__()
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MediaAttention(width, media_width, geometry.num_heads, geometry.head_dim)
        self.feed_forward = FeedForward(width, geometry.ffn_multiple)

    def forward(self, x: Tensor, media: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention_gate.tanh() * self.attention(self.attention_norm(x), media, mask)
        return x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x))


class DecoderLayer(nn.Module):
    """A layer of LLaMA, with the gated block that stands before it."""

    def __init__(self, model: ModelConfig, number: int) -> None:
        super().__init__()
        c, wide = model.language, model.language.hidden_size
        self.num_heads = c.num_heads
        if (c.num_kv_heads or c.num_heads) != c.num_heads:
            raise ValueError("grouped queries are not written here: give as many key heads as query heads")
        self.input_layernorm, self.pre_mlp_layernorm = RMSNorm(wide, c.norm_eps), RMSNorm(wide, c.norm_eps)
        linears = {"linear_qkv": nn.Linear(wide, 3 * wide, bias=False)}
        self.self_attention = nn.ModuleDict({**linears, "linear_proj": nn.Linear(wide, wide, bias=False)})
        ffn = c.ffn_hidden_size
        gate_up, down = nn.Linear(wide, 2 * ffn, bias=False), nn.Linear(ffn, wide, bias=False)
        self.mlp = nn.ModuleDict({"linear_fc1": gate_up, "linear_fc2": down})
        if model.cross_attention.stands_before(number):
            self.gated_cross_attention = GatedBlock(wide, model.vision.width, model.cross_attention)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], media: Tensor, mask: Tensor) -> Tensor:
        if hasattr(self, "gated_cross_attention"):
            x = self.gated_cross_attention(x, media, mask)
        qkv = heads_of(self.self_attention["linear_qkv"](self.input_layernorm(x)), self.num_heads)
        q, k, v = qkv.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(turned(q, *turn), turned(k, *turn), v, is_causal=True)
        x = x + self.self_attention["linear_proj"](joined(attended))
        gate, up = self.mlp["linear_fc1"](self.pre_mlp_layernorm(x)).chunk(2, dim=-1)
        return x + self.mlp["linear_fc2"](F.silu(gate) * up)


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class Decoder(nn.Module):
    """Embedding, layers, norm; the output layer is applied by `PlainFlamingo`."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        c = model.language
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(c.vocab_size, c.hidden_size)})
        layers = nn.ModuleList(DecoderLayer(model, number) for number in range(c.num_layers))
        norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.decoder = nn.ModuleDict({"layers": layers, "final_layernorm": norm})
        self.output_layer = nn.Linear(c.hidden_size, c.vocab_size, bias=False)


class PlainFlamingo(nn.Module):
    """Logits of padded rows with images.

    Args:
        image_id: placeholder of an image.
    """

    def __init__(self, model: ModelConfig, image_id: int) -> None:
        super().__init__()
        self.config, self.image_id = model, image_id
        self.vision = Encoder(model.vision)
        self.connector = Resampler(model.vision.width, model.connector)
        self.language = Decoder(model)

    def forward(self, batch: Batch) -> Tensor:
        """[B, S, V] of rows that are not packed."""
        ids = batch.input_ids
        weight = self.language.output_layer.weight
        with torch.no_grad():  # the encoder is frozen
            features = self.vision(batch.images.to(weight.dtype))
        media, mask = self._media(self.connector(features), batch)
        x = self.language.embedding["word_embeddings"](ids)
        turn = self._rotation(ids.shape[1], x)
        for layer in self.language.decoder["layers"]:
            x = layer(x, turn, media, mask)
        logits: Tensor = self.language.output_layer(self.language.decoder["final_layernorm"](x))
        return logits

    def loss(self, batch: Batch, num_labels: int) -> Tensor:
        """Cross entropy over all positions, summed where there are labels, divided by `num_labels`."""
        logits = self(batch).flatten(0, 1).float()
        labels = batch.labels.flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / num_labels

    def _media(self, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """[B, T * L, W] by sample, and the dense mask [B, 1, S, T * L] of the latest image of a position."""
        counts, num_latents = batch.images_per_sample, latents.shape[1]
        media = latents.new_zeros(len(counts), int(counts.max()), *latents.shape[1:])
        sample = torch.repeat_interleave(counts)
        place = torch.arange(len(sample), device=sample.device) - (counts.cumsum(0) - counts)[sample]
        media = media.index_put((sample, place), latents)
        seen = (batch.input_ids == self.image_id).cumsum(dim=1)
        number = torch.arange(1, media.shape[1] + 1, device=seen.device).repeat_interleave(num_latents)
        return media.flatten(1, 2), (seen[..., None] == number)[:, None]

    def _rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config.language
        half = torch.arange(0, c.head_dim, 2, device=like.device) / c.head_dim
        angles = torch.arange(length, device=like.device)[:, None] * c.rope_theta**-half
        both = torch.cat([angles, angles], dim=-1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)
