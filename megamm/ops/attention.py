"""Attention in bf16 on processors that multiply fp32 faster (ops.linear): in fp32, rounded once.

Only bf16 tensors, and the normalisers of the softmax, are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F

from megamm.ops.linear import fp32_is_faster

_MIN_QUERIES = 32  # below, converting the keys takes longer than it saves


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Optional[torch.Tensor] = None,
    is_causal: bool = False,
    scale: Optional[float] = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T scale) v, as torch's scaled_dot_product_attention.

    Args:
        q, k, v: [B, heads, positions, d]; k and v may have fewer heads, each for a group of queries.
        mask: bool, True where a query attends; None: everywhere, or causally.
        scale: None: 1 / sqrt(d).
    Returns:
        [B, heads, positions, d].
    """
    is_slow = q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] >= _MIN_QUERIES
    is_plain = mask is None and dropout == 0 and q.shape[1] == k.shape[1] and q.shape[3] == v.shape[3]
    if is_slow and is_plain and fp32_is_faster():
        found: torch.Tensor = _InFloat.apply(q, k, v, is_causal, scale)
        return found
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


class _InFloat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, is_causal: bool, scale: Optional[float]
    ) -> torch.Tensor:
        wide = (x.float() for x in (q, k, v))
        out, normalisers = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *wide, 0.0, is_causal, scale=scale
        )
        rounded: torch.Tensor = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, rounded, normalisers)
        ctx.options = is_causal, scale
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        q, k, v, out, normalisers = ctx.saved_tensors
        is_causal, scale = ctx.options
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.float() for x in (grads[0], q, k, v, out)), normalisers, 0.0, is_causal, scale=scale
        )
        return *(grad.to(q.dtype) for grad in found), None, None
