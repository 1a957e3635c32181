"""RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and behind a residual addition.

    y = x * rstd * weight        rstd = 1 / sqrt(mean(x^2) + eps)

Everything is computed in fp32 (fp64 for fp64 input) and rounded once, to the dtype of x, as
torch.nn.functional.rms_norm and Transformer Engine do. (Hugging Face's LLaMA rounds x * rstd to the
dtype of x before the weight: in fp32 the same numbers, in bf16 one rounding more.)
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from megamm.ops import call, fused_devices

_FUSED_DEVICES = fused_devices("rms_norm")
FUSED_DTYPES = {  # of the norms and gates that share csrc/common/norm.h
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, fused where the extension has a kernel for it.

    Args:
        x: [..., H], any leading shape, any strides (rows that are not contiguous are copied).
        weight: [H], in the dtype of x or fp32.
        eps: added to the mean square.

    Returns:
        [..., H] in the dtype of x, contiguous where fused. Differentiable once in x and weight; the
        gradient of an input that needs none is not computed.

    Raises:
        ValueError: weight is not [H].
    """
    _check_weight("rms_norm", x, weight)
    if _is_fused(x, weight):
        return call(torch.ops.megamm.rms_norm, x, weight, eps)[0]
    return rms_norm_ref(x, weight, eps)


def rms_norm_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A residual addition and the RMSNorm behind it, in one pass over the data where fused.

    Args:
        x: [..., H], as for rms_norm.
        residual: what is added to x: same shape and dtype.
        weight: [H], in the dtype of x or fp32.
        eps: added to the mean square.

    Returns:
        (y, sum), both [..., H] in the dtype of x: sum is x + residual, y its norm: of the rounded sum, so
        the numbers are those of the addition followed by rms_norm. Differentiable once, through either.

    Raises:
        ValueError: weight is not [H], or residual is not like x.
    """
    _check_weight("rms_norm_add", x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"rms_norm_add: residual is {residual.dtype} {list(residual.shape)},"
            f" x is {x.dtype} {list(x.shape)}"
        )
    if _is_fused(x, weight) and residual.device == x.device:
        y, total, _ = call(torch.ops.megamm.rms_norm_add, x, residual, weight, eps)
        return y, total
    return rms_norm_add_ref(x, residual, weight, eps)


def rms_norm_add_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm_add in plain torch."""
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same function in plain torch: what the kernels are tested against and the fallback without them."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    x_acc = x.to(accumulate)
    rstd = torch.rsqrt(x_acc.square().mean(dim=-1, keepdim=True) + eps)
    return (x_acc * rstd * weight.to(accumulate)).to(x.dtype)


def _check_weight(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{name}: weight is {list(weight.shape)}, the last dimension of x is {x.shape[-1:]}")


def _is_fused(x: torch.Tensor, weight: torch.Tensor) -> bool:
    device = x.device.type
    return (
        device in _FUSED_DEVICES
        and x.dtype in FUSED_DTYPES[device]
        and weight.dtype in (x.dtype, torch.float32)
    )


def _fake_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate)


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if need_x else 0), weight.new_empty(weight.shape if need_weight else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, grad: torch.Tensor, _grad_rstd: Any) -> tuple[Any, Any, None]:
    x, weight, rstd = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad[:2]
    grad_x, grad_weight = torch.ops.megamm.rms_norm_backward(grad, x, weight, rstd, need_x, need_weight)
    return grad_x if need_x else None, grad_weight if need_weight else None, None


def _fake_add_forward(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, rstd = _fake_forward(x, weight, eps)
    return y, x.new_empty(x.shape), rstd


def _fake_add_backward(
    grad: torch.Tensor,
    grad_sum: Optional[torch.Tensor],
    total: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    need_sum: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_backward(grad, total, weight, rstd, need_sum, need_weight)


def _save_for_add_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, total, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total, inputs[2], rstd)


def _add_backward(
    ctx: Any, grad: Optional[torch.Tensor], grad_sum: Optional[torch.Tensor], _grad_rstd: Any
) -> tuple[Any, Any, Any, None]:
    total, weight, rstd = ctx.saved_tensors
    if grad is None:  # nobody used the norm
        return grad_sum, grad_sum, None, None
    need_x, need_residual, need_weight = ctx.needs_input_grad[:3]
    grad_total, grad_weight = torch.ops.megamm.rms_norm_add_backward(
        grad, grad_sum, total, weight, rstd, need_x or need_residual, need_weight
    )
    return (
        grad_total if need_x else None,
        grad_total if need_residual else None,
        grad_weight if need_weight else None,
        None,
    )


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::rms_norm", _fake_forward)
    torch.library.register_fake("megamm::rms_norm_backward", _fake_backward)
    torch.library.register_autograd("megamm::rms_norm", _backward, setup_context=_save_for_backward)
    torch.library.register_fake("megamm::rms_norm_add", _fake_add_forward)
    torch.library.register_fake("megamm::rms_norm_add_backward", _fake_add_backward)
    torch.library.register_autograd(
        "megamm::rms_norm_add", _add_backward, setup_context=_save_for_add_backward
    )
