"""Core attention on torch's scaled_dot_product_attention, in megatron-core's slot.

megatron's own local core attention materialises the [S, S] probabilities; torch picks a flash or
memory-efficient kernel on CUDA and a fused one on the CPU (3x faster there, half the memory).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megamm.layers.module import MegatronModule


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
        if config.context_parallel_size > 1:
            raise ValueError("SDPACoreAttention has no context parallelism; use the 'te' backend for it")
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

        `attention_mask` follows megatron: True is masked out. Returns [S, B, heads * d].
        """
        if packed_seq_params is not None or attention_bias is not None:
            raise NotImplementedError(
                "SDPACoreAttention takes neither packed sequences nor an attention bias"
            )
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask_type = attn_mask_type or self.attn_mask_type
        is_causal, mask = self._mask(q.shape[2], k.shape[2], mask_type, attention_mask, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
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
        if mask_type != AttnMaskType.causal:
            return False, None if attention_mask is None else ~attention_mask
        if self.window is None and num_queries == num_keys:
            return True, None
        # queries are the last positions of the keys (cached decoding)
        rows = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        columns = torch.arange(num_keys, device=device)[None]
        allowed = columns <= rows
        if self.window is not None:
            allowed &= columns >= rows - self.window
        return False, allowed
