"""Self-attention whose queries and keys are turned by megamm's op, as they are split."""

from __future__ import annotations

from typing import Any, Optional

import torch
from megatron.core.transformer.attention import SelfAttention

from megamm.layers.cache import DecodingCache
from megamm.ops.rope import rope_qkv


class RotarySelfAttention(SelfAttention):
    """megatron's, but `rotary_pos_emb` is a table of cosines and sines with a row for each position."""

    cache: Optional[DecodingCache] = None  # while answers are generated
    _table: Optional[torch.Tensor] = None

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        rotary_pos_emb: Optional[torch.Tensor] = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """[S, B, H] to [S, B, H] and the bias that is still to be added; the table is [S, head_dim]."""
        self._table = rotary_pos_emb
        found: tuple[torch.Tensor, Optional[torch.Tensor]]
        found = super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **kwargs)
        self._table = None
        return found

    def decode_next(
        self, hidden_states: torch.Tensor, table: torch.Tensor, mask: Optional[torch.Tensor]
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """As `forward` with a cache, for [1, B, H] of one further token of each row.

        Args:
            mask: [B, 1, 1, K] bool, True for what is not attended to.
        """
        self._table = table
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        self._table = None
        out, bias = self.linear_proj(self.core_attention(query, key, value, mask))
        return out, bias

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values: [S, B, heads, head_dim], of this rank's heads. With a cache the keys and
        values are those of the positions before, too."""
        qkv, _ = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        assert self._table is not None
        cache = self.cache
        positions = None if cache is None or cache.is_prompt else cache.lengths[None]
        query, key, value = rope_qkv(qkv, self.hidden_size_per_attention_head, self._table, positions)
        num_heads = self.num_attention_heads_per_partition
        if query.shape[2] > num_heads:  # fewer groups than ranks: some ranks share one and its queries
            ranks = query.shape[2] // num_heads
            query = query.chunk(ranks, dim=2)[self.pg_collection.tp.rank() % ranks]
        if cache is not None:
            key, value = cache.extend(self.layer_number, key, value)
        return query, key, value
