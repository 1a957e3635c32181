"""Linear layers on a CPU: a few rows in fp32, and bf16 on processors that multiply fp32 faster.

Generated tokens are a few rows, for which the product is bound by reading the weight; how it is put decides
how fast that goes.

Without AMX, Intel's AVX-512 units take bf16 at half the rate of fp32, and processors without any bf16
instructions convert in the innermost loop. There the product is computed in fp32, of converted operands, and
rounded once: what a bf16 product with fp32 sums is, too. Only bf16 tensors are kept for the backward pass.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F

_MIN_ROWS = 32  # below, converting the weight takes longer than it saves
_FEW_ROWS = 64
_CHUNK = 1024  # output features; larger weights are read more slowly for three to eight rows


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x @ weight.T + bias, as torch.nn.functional.linear.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].
    Returns:
        [..., out] in the dtype of x.
    """
    is_slow = x.dtype == torch.bfloat16 and x.device.type == "cpu" and fp32_is_faster()
    if is_slow and weight.dtype == x.dtype and x.numel() >= _MIN_ROWS * x.shape[-1]:
        found: torch.Tensor = _InFloat.apply(x, weight, bias)
        return found
    is_single = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
    if is_single and not torch.is_grad_enabled() and x.numel() <= _FEW_ROWS * x.shape[-1]:
        return _few_rows(x, weight, bias)
    return F.linear(x, weight, bias)


def _few_rows(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """The same product: as weight @ x for one row and for nine and more, in parts for three to eight."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 or len(rows) > 8:
        out = torch.mm(weight, rows.t()).t()
    elif len(rows) > 2 and len(weight) > _CHUNK:
        out = torch.cat([F.linear(rows, part) for part in weight.split(_CHUNK)], dim=-1)
    else:
        return F.linear(x, weight, bias)
    out = (out if bias is None else out + bias).contiguous()
    return out.view(*x.shape[:-1], -1)


@cache
def fp32_is_faster() -> bool:
    """Whether this processor multiplies matrices of fp32 faster than those of bf16. By what it is, not by
    measuring, so that a resumed run computes as before."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    fields = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in lines)}
    flags, vendor = fields.get("flags", []), fields.get("vendor_id", [])
    if not flags or "amx_bf16" in flags:  # other architectures name their features otherwise
        return False
    return vendor == ["GenuineIntel"] or "avx512_bf16" not in flags


class _InFloat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        wide = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.float()).to(x.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias
