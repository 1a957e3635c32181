"""Attention from one sequence to another and Flamingo's tanh-gated block, tensor-parallel over heads.

Shapes follow megatron: sequence first. S text positions, M media tokens, B samples.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import nn

from megamm.config import CrossAttentionConfig
from megamm.layers.backend import column_parallel, row_parallel
from megamm.layers.module import MegatronModule
from megamm.layers.norms import LayerNorm, mark_sequence_parallel


class MultiHeadAttention(MegatronModule):
    """Queries from one sequence, keys and values from another; heads sharded, no biases.

    Under sequence parallelism both inputs are shards of their sequences: the column-parallel linears
    gather them, the row-parallel one scatters the result.
    """

    def __init__(
        self,
        config: Any,
        backend: Any,
        query_size: int,
        context_size: int,
        num_heads: int,
        head_dim: int,
        tp_group: Any,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.head_dim = head_dim
        self.num_local_heads = num_heads // tp_group.size()
        inner = num_heads * head_dim
        self.to_q = column_parallel(backend, config, query_size, inner, tp_group)
        # rows are grouped by head (its keys, then its values), so that a shard holds whole heads
        self.to_kv = column_parallel(backend, config, context_size, 2 * inner, tp_group)
        self.to_out = row_parallel(backend, config, inner, query_size, tp_group)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        mask: Optional[torch.Tensor] = None,
        keep: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """[S, B, query_size] attending to [M, B, context_size].

        Args:
            mask: [B, 1, S, M] bool, True where attention is allowed; None allows all.
            keep: [S, B, 1]; 0 zeroes the attention output of a position exactly.
        """
        q, _ = self.to_q(x)
        kv, _ = self.to_kv(context)
        q = self._split_heads(q, self.head_dim)
        k, v = self._split_heads(kv, 2 * self.head_dim).chunk(2, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.permute(2, 0, 1, 3).flatten(2)  # [S, B, local heads * head_dim]
        if keep is not None:
            out = out * keep
        out, _ = self.to_out(out)
        return out

    def _split_heads(self, x: torch.Tensor, size: int) -> torch.Tensor:
        length, batch, _ = x.shape
        return x.view(length, batch, self.num_local_heads, size).permute(1, 2, 0, 3)


class FeedForward(MegatronModule):
    """Linear, GELU, Linear without biases, sharded over the inner features."""

    def __init__(self, config: Any, backend: Any, size: int, multiple: int, tp_group: Any) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.linear_1 = column_parallel(backend, config, size, multiple * size, tp_group)
        self.linear_2 = row_parallel(backend, config, multiple * size, size, tp_group)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.linear_1(x)
        out, _ = self.linear_2(F.gelu(hidden))
        return out


class GatedCrossAttention(MegatronModule):
    """x + tanh(a) Attn(LN(x), media), then x + tanh(f) FF(LN(x)); both gates start at 0.

    Flamingo (Alayrac et al. 2022), section 2.2 and figure 4; geometry of OpenFlamingo and InfiMM.
    """

    def __init__(
        self, config: Any, backend: Any, geometry: CrossAttentionConfig, media_width: int, tp_group: Any
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        hidden = config.hidden_size
        self.attention_norm = LayerNorm(config, hidden)
        self.attention = MultiHeadAttention(
            config, backend, hidden, media_width, geometry.num_heads, geometry.head_dim, tp_group
        )
        self.feed_forward_norm = LayerNorm(config, hidden)
        self.feed_forward = FeedForward(config, backend, hidden, geometry.ffn_multiple, tp_group)
        self.attention_gate = self._gate(config)
        self.feed_forward_gate = self._gate(config)

    @staticmethod
    def _gate(config: Any) -> nn.Parameter:
        gate = nn.Parameter(torch.zeros(1, dtype=config.params_dtype))
        return mark_sequence_parallel(gate, config.sequence_parallel)

    def forward(self, x: torch.Tensor, media: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[S, B, H] hidden states, [M, B, media_width] media tokens, mask [B, 1, S, M] (True: attend).

        A position that may attend to nothing (before the first image) gets no attention output.
        """
        sees_media = mask.any(dim=-1, keepdim=True)  # [B, 1, S, 1]
        keep = sees_media[:, 0].transpose(0, 1).to(x.dtype)  # [S, B, 1]
        # softmax over nothing is NaN: let such rows attend to everything, then drop the result
        attended = self.attention(self.attention_norm(x), media, mask | ~sees_media, keep)
        x = x + self.attention_gate.tanh() * attended
        return x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x))
