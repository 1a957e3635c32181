"""Core attention on torch's scaled_dot_product_attention, in megatron-core's slot.

megatron's own local core attention materialises the [S, S] probabilities; torch picks a flash or
memory-efficient kernel on CUDA and a fused one on the CPU (3x faster there, half the memory).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megamm.layers.context import context_chunks, context_gather
from megamm.layers.module import MegatronModule
from megamm.ops.attention import attention


class SDPACoreAttention(MegatronModule):
    """softmax(Q K^T / sqrt(d)) V with causal, sliding-window or explicit masks and grouped queries."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: Optional[float] = None,
        softmax_scale: Optional[float] = None,
        cp_comm_type: Optional[str] = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.context_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.window = config.window_size[0] if config.window_size else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        attn_mask_type: Optional[AttnMaskType] = None,
        attention_bias: Optional[torch.Tensor] = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attention of [S, B, heads, d] queries over [S_kv, B, kv_heads, d] keys and values.

        `attention_mask` follows megatron: True is masked out. `packed_seq_params` (layers.documents) cuts
        the sequence into documents that attend to themselves alone. Returns [S, B, heads * d].
        """
        if attention_bias is not None:
            raise NotImplementedError("SDPACoreAttention takes no attention bias")
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            # one causal call per document: the work is that of the documents, and no mask is made
            parts = [x.split(packed_seq_params.lengths) for x in (query, key, value)]
            return torch.cat([self._attend(q, k, v, None, mask_type) for q, k, v in zip(*parts, strict=True)])
        if self.context_group is not None:
            return self._over_contexts(query, key, value, mask_type)
        return self._attend(query, key, value, attention_mask, mask_type)

    def _over_contexts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_type: AttnMaskType
    ) -> torch.Tensor:
        """Causal attention of this rank's two chunks of the sequence to all that lies before them."""
        key, value = context_gather(key, self.context_group), context_gather(value, self.context_group)
        outputs = []
        for chunk, queries in zip(context_chunks(self.context_group), query.chunk(2), strict=True):
            end = (chunk + 1) * len(queries)
            outputs.append(self._attend(queries, key[:end], value[:end], None, mask_type))
        return torch.cat(outputs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Optional[torch.Tensor],
        mask_type: AttnMaskType,
    ) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        is_causal, mask = self._mask(q.shape[2], k.shape[2], mask_type, attention_mask, q.device)
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask, is_causal, self.softmax_scale, dropout)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _mask(
        self,
        num_queries: int,
        num_keys: int,
        mask_type: AttnMaskType,
        attention_mask: Optional[torch.Tensor],
        device: torch.device,
    ) -> tuple[bool, Optional[torch.Tensor]]:
        """(is_causal, mask) for torch, where True means "attend"."""
        if attention_mask is not None:
            return False, ~attention_mask
        if mask_type != AttnMaskType.causal or (num_queries == 1 and self.window is None):
            return False, None
        if self.window is None and num_queries == num_keys:
            return True, None
        # queries are the last positions of the keys (cached decoding)
        rows = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        columns = torch.arange(num_keys, device=device)[None]
        allowed = columns <= rows
        if self.window is not None:
            allowed &= columns >= rows - self.window
        return False, allowed
