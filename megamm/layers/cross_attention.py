"""Attention from one sequence to another and the tanh-gated blocks, tensor-parallel over heads.

Shapes follow megatron: sequence first. S text positions, M media tokens, B samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import nn

from megamm.config import CrossAttentionConfig
from megamm.layers.backend import column_parallel, row_parallel
from megamm.layers.cache import DecodingCache
from megamm.layers.media_segments import MediaSegments, attend_to_segments
from megamm.layers.module import MegatronModule
from megamm.layers.norms import LayerNorm, RMSNorm, mark_sequence_parallel
from megamm.ops.gated_residual import gated_residual, gated_residual_layer_norm, gated_residual_rms_norm
from megamm.ops.swiglu import swiglu


@dataclass(frozen=True)
class MediaMask:
    """Who attends to which media, for all gated blocks of a micro-batch.

    Attributes:
        segments: which image's media tokens each position attends to.
        keep_block: [S, B, 1] bool, False at the positions of samples (documents of packed rows) without any
            image; a shard under sequence parallelism. None where the geometry does not ask.
    """

    segments: MediaSegments
    keep_block: Optional[torch.Tensor] = None


class MultiHeadAttention(MegatronModule):
    """Queries from one sequence, keys and values from another; heads sharded.

    Under sequence parallelism both inputs are shards of their sequences: the column-parallel linears
    gather them, the row-parallel one scatters the result.

    Args:
        bias: whether the linears have biases.
        head_norm: makes a norm over the features of a head, one for all queries and one for all keys.
            Each rank sees the norms act on its own heads only, so their gradients must be summed over the
            ranks: megatron's finalize_model_grads does so for the names `q_layernorm` and `k_layernorm`
            when config.qk_layernorm is set (engine.transformer_config).
    """

    cache: Optional[DecodingCache] = None  # while answers are generated
    layer_number = 0  # its place in the cache

    def __init__(
        self,
        config: Any,
        backend: Any,
        query_size: int,
        context_size: int,
        num_heads: int,
        head_dim: int,
        tp_group: Any,
        bias: bool = False,
        head_norm: Optional[Callable[[], nn.Module]] = None,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.head_dim = head_dim
        self.num_local_heads = num_heads // tp_group.size()
        inner = num_heads * head_dim
        self.to_q = column_parallel(backend, config, query_size, inner, tp_group, bias)
        # rows are grouped by head (its keys, then its values), so that a shard holds whole heads
        self.to_kv = column_parallel(backend, config, context_size, 2 * inner, tp_group, bias)
        self.to_out = row_parallel(backend, config, inner, query_size, tp_group, bias)
        self.q_layernorm = head_norm() if head_norm else nn.Identity()
        self.k_layernorm = head_norm() if head_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        segments: Optional[MediaSegments] = None,
    ) -> torch.Tensor:
        """[S, B, query_size] attending to [M, B, context_size].

        Args:
            segments: which part of the context each position attends to; one that attends to nothing gets
                exactly 0 (without biases). None: all to all.
        """
        q, (k, v) = self._queries(x), self._keys_and_values(context)
        if segments is None:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [B, local heads, positions, head_dim]
            out = F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3)
        else:
            out = attend_to_segments(q, k, v, segments)
            if self.cache is not None:
                self.cache.keep_media(self.layer_number, k, v, segments.num_latents)
        return self._output(out)

    def forward_cached(self, x: torch.Tensor) -> torch.Tensor:
        """[1, B, query_size] of further tokens, attending to what the cache has of the context."""
        assert self.cache is not None
        return self._output(self.cache.attend_to_media(self.layer_number, self._queries(x)))

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        q, _ = self.to_q(x)
        return self.q_layernorm(self._split_heads(q, self.head_dim))

    def _keys_and_values(self, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kv, _ = self.to_kv(context)
        k, v = self._split_heads(kv, 2 * self.head_dim).chunk(2, dim=-1)
        return self.k_layernorm(k), v

    def _output(self, attended: torch.Tensor) -> torch.Tensor:
        out, _ = self.to_out(attended.flatten(2).contiguous())  # [S, B, local heads * head_dim]
        return out

    def _split_heads(self, x: torch.Tensor, size: int) -> torch.Tensor:
        return x.unflatten(2, (self.num_local_heads, size))


class FeedForward(MegatronModule):
    """Linear, activation, Linear; sharded over the inner features."""

    def __init__(
        self,
        config: Any,
        backend: Any,
        size: int,
        multiple: int,
        tp_group: Any,
        bias: bool = False,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.activation = activation
        self.linear_1 = column_parallel(backend, config, size, multiple * size, tp_group, bias)
        self.linear_2 = row_parallel(backend, config, multiple * size, size, tp_group, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.linear_1(x)
        out, _ = self.linear_2(self.activation(hidden))
        return out


class SwiGLU(MLP):
    """The language model's feed-forward, bias-free: down(silu(gate(x)) * up(x)).

    megatron's MLP, whose one sharded linear for gate and up gathers the sequence once instead of twice.
    """

    def __init__(self, config: Any, backend: Any, tp_group: Any) -> None:
        parts = MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(),
            activation_func=swiglu,
            linear_fc2=backend.row_parallel_linear(),
        )
        super().__init__(config, parts, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out, _ = super().forward(x)
        return out


Parts = tuple[Callable[[], nn.Module], MultiHeadAttention, nn.Module]  # norm, attention, feed-forward


def _flamingo(
    config: Any, backend: Any, geometry: CrossAttentionConfig, media_width: int, tp_group: Any
) -> Parts:
    """LayerNorm, heads of the block's own, GELU feed-forward (OpenFlamingo, InfiMM)."""
    hidden = config.hidden_size
    attention = MultiHeadAttention(
        config, backend, hidden, media_width, geometry.num_heads, geometry.head_dim, tp_group
    )
    feed_forward = FeedForward(config, backend, hidden, geometry.ffn_multiple, tp_group)
    return partial(LayerNorm, config, hidden), attention, feed_forward


def _idefics(
    config: Any, backend: Any, geometry: CrossAttentionConfig, media_width: int, tp_group: Any
) -> Parts:
    """RMSNorm, the language model's number and size of heads, its SwiGLU (Laurençon et al. 2023, IDEFICS)."""
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.kv_channels
    norm = partial(RMSNorm, config, eps=config.layernorm_epsilon)
    head_norm = partial(norm, hidden_size=head_dim) if geometry.qk_norm else None
    attention = MultiHeadAttention(
        config, backend, hidden, media_width, heads, head_dim, tp_group, head_norm=head_norm
    )
    return partial(norm, hidden_size=hidden), attention, SwiGLU(config, backend, tp_group)


class GatedCrossAttention(MegatronModule):
    """x + tanh(a) Attn(norm(x), media), then x + tanh(f) FF(norm(x)), with gates that usually start at 0.

    Flamingo (Alayrac et al. 2022), section 2.2 and figure 4.

    Args:
        config: of the decoder.
        backend: provides the parallel linears.
        geometry: which norms, heads and feed-forward, and how many gates.
        media_width: width of the media tokens.
        tp_group: tensor-parallel group.
    """

    attention: MultiHeadAttention

    def __init__(
        self, config: Any, backend: Any, geometry: CrossAttentionConfig, media_width: int, tp_group: Any
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.skip_text_only = geometry.skip_text_only
        parts = _idefics if geometry.geometry == "idefics" else _flamingo
        norm, attention, feed_forward = parts(config, backend, geometry, media_width, tp_group)
        self.attention_norm, self.attention = norm(), attention
        self.feed_forward_norm, self.feed_forward = norm(), feed_forward
        num_gates = config.hidden_size if geometry.vector_gates else 1
        self.attention_gate = self._gate(config, num_gates)
        self.feed_forward_gate = self._gate(config, num_gates)

    @staticmethod
    def _gate(config: Any, size: int) -> nn.Parameter:
        gate = nn.Parameter(torch.zeros(size, dtype=config.params_dtype))
        return mark_sequence_parallel(gate, config.sequence_parallel)

    def forward(
        self,
        x: torch.Tensor,
        media: Optional[torch.Tensor],
        mask: Optional[MediaMask],
    ) -> torch.Tensor:
        """The hidden states behind the block, [S, B, H].

        A position that may attend to nothing (before the first image) gets no attention output.

        Args:
            x: [S, B, H] hidden states.
            media: [M, B, media_width] media tokens.
            mask: which image's media tokens each position attends to, and with skip_text_only which positions
                pass the block unchanged: without keep_block those of samples without a position that sees
                media. None for both: what the cache has of the media.
        """
        normed = self.attention_norm(x)
        if mask is None:
            attended = self.attention.forward_cached(normed)
        else:
            attended = self.attention(normed, media, mask.segments)
        normed, x = self._add_and_norm(x, attended)
        keep = None
        if self.skip_text_only:  # the attention output of such samples is zero already
            keep = self._keep(mask)
        return gated_residual(x, self.feed_forward(normed), self.feed_forward_gate, keep)

    def _keep(self, mask: Optional[MediaMask]) -> torch.Tensor:
        if mask is None:
            assert self.attention.cache is not None
            return self.attention.cache.sees_media
        return mask.segments.sees_media if mask.keep_block is None else mask.keep_block

    def _add_and_norm(self, x: torch.Tensor, attended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first gated sum, after the norm of the feed-forward and as it is."""
        norm, gate = self.feed_forward_norm, self.attention_gate
        if isinstance(norm, RMSNorm):
            return gated_residual_rms_norm(x, attended, gate, norm.weight, norm.eps)
        assert isinstance(norm, LayerNorm)
        return gated_residual_layer_norm(x, attended, gate, norm.weight, norm.bias, norm.eps)
