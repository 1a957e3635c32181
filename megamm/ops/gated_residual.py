"""Tanh-gated residual (Flamingo, Alayrac et al. 2022, section 2.2), alone and followed by a norm.

    sum = x + tanh(gate) * branch        where keep is true; x elsewhere
    y = norm(sum)                        RMSNorm or layer norm, of the rounded sum

Everything is computed in fp32 (fp64 for fp64 input); sum and y are rounded once each, to the dtype of x.
The branch of a row that is not kept is not read, so it may hold anything.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from megamm.ops import call, fused_devices
from megamm.ops.layer_norm import layer_norm, layer_norm_ref
from megamm.ops.rms_norm import FUSED_DTYPES, rms_norm, rms_norm_ref

_FUSED_DEVICES = fused_devices("gated_residual")


def gated_residual(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, keep: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """x + tanh(gate) * branch, fused where the extension has a kernel for it.

    Args:
        x: [..., H], any strides (rows that are not contiguous are copied).
        branch: [..., H], shape and dtype of x.
        gate: [1] or [H], before tanh, in the dtype of x or fp32.
        keep: bool, [...] or what broadcasts to [..., 1]; False: the row of x is returned as it is.

    Returns:
        [..., H] in the dtype of x. Differentiable once in x, branch and gate; the gradient of an input that
        needs none is not computed.

    Raises:
        ValueError: branch is not like x, gate is neither [1] nor [H], or keep is not such a mask.
    """
    rows = _checked_rows(x, branch, gate, keep)
    if _is_fused(x, branch, gate):
        return call(torch.ops.megamm.gated_residual, x, branch, gate, rows)
    return gated_residual_ref(x, branch, gate, rows)


def gated_residual_rms_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    keep: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, sum): gated_residual, and the RMSNorm of its result.

    Args and raises as gated_residual; weight: [H], in the dtype of x or fp32; eps: added to the mean square.
    The norm is that of the rounded sum, as from the two operators one after the other.
    """
    if _is_fused(x, branch, gate, weight):
        rows = _checked_rows(x, branch, gate, keep)
        total, y, _ = call(torch.ops.megamm.gated_residual_rms_norm, x, branch, gate, rows, weight, eps)
    else:
        total = gated_residual(x, branch, gate, keep)
        y = rms_norm(total, weight, eps)
    return y, total


def gated_residual_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    keep: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, sum): gated_residual, and the layer norm of its result; else as gated_residual_rms_norm."""
    if _is_fused(x, branch, gate, weight) and weight.dtype == bias.dtype:
        rows = _checked_rows(x, branch, gate, keep)
        total, y, _, _ = call(
            torch.ops.megamm.gated_residual_layer_norm, x, branch, gate, rows, weight, bias, eps
        )
    else:
        total = gated_residual(x, branch, gate, keep)
        y = layer_norm(total, weight, bias, eps)
    return y, total


def gated_residual_ref(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, keep: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """gated_residual in plain torch; keep: [...], a bool per row of x."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    total = x.to(accumulate) + gate.to(accumulate).tanh() * branch.to(accumulate)
    return (total if keep is None else torch.where(keep[..., None], total, x.to(accumulate))).to(x.dtype)


def gated_residual_rms_norm_ref(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    keep: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gated_residual_rms_norm in plain torch; keep: [...], a bool per row of x."""
    total = gated_residual_ref(x, branch, gate, keep)
    return rms_norm_ref(total, weight, eps), total


def gated_residual_layer_norm_ref(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    keep: Optional[torch.Tensor] = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gated_residual_layer_norm in plain torch; keep: [...], a bool per row of x."""
    total = gated_residual_ref(x, branch, gate, keep)
    return layer_norm_ref(total, weight, bias, eps), total


def _checked_rows(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, keep: Optional[torch.Tensor]
) -> Optional[torch.Tensor]:
    """`keep` as one bool per row of x."""
    if branch.shape != x.shape or branch.dtype != x.dtype:
        raise ValueError(
            f"gated_residual: branch is {branch.dtype} {list(branch.shape)}, x is {x.dtype} {list(x.shape)}"
        )
    if gate.shape != x.shape[-1:] and gate.shape != (1,):
        raise ValueError(
            f"gated_residual: gate is {list(gate.shape)}, expected [1] or the last dimension of x"
            f" ({list(x.shape[-1:])})"
        )
    if keep is None:
        return None
    if keep.dtype != torch.bool:
        raise ValueError(f"gated_residual: keep is {keep.dtype}, expected torch.bool")
    if keep.shape == x.shape[:-1]:
        return keep
    try:
        return keep.expand(*x.shape[:-1], 1).squeeze(-1)
    except RuntimeError:
        raise ValueError(
            f"gated_residual: keep is {list(keep.shape)}, which does not broadcast to the rows of x"
            f" ({[*x.shape[:-1], 1]})"
        ) from None


def _is_fused(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, weight: Optional[torch.Tensor] = None
) -> bool:
    device = x.device.type
    allowed = (x.dtype, torch.float32)
    return (
        device in _FUSED_DEVICES
        and x.dtype in FUSED_DTYPES[device]
        and branch.device == x.device
        and gate.dtype in allowed
        and (weight is None or weight.dtype in allowed)
    )


def _fake_sum(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, keep: Optional[torch.Tensor]
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_rms(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    keep: Optional[torch.Tensor],
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rstd = x.new_empty(x.shape[:-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), x.new_empty(x.shape), rstd


def _fake_layer(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    keep: Optional[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    total, y, rstd = _fake_rms(x, branch, gate, keep, weight, eps)
    return total, y, torch.empty_like(rstd), rstd


def _fake_backward(
    grad: torch.Tensor,
    branch: Optional[torch.Tensor],
    gate: torch.Tensor,
    keep: Optional[torch.Tensor],
    need_branch: bool,
    need_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        grad.new_empty(grad.shape if need_branch else 0),
        gate.new_empty(gate.shape if need_gate else 0),
    )


def _fake_norm_backward(
    grad: torch.Tensor,
    grad_sum: Optional[torch.Tensor],
    total: torch.Tensor,
    branch: Optional[torch.Tensor],
    gate: torch.Tensor,
    keep: Optional[torch.Tensor],
    weight: torch.Tensor,
    mean: Optional[torch.Tensor],
    rstd: torch.Tensor,
    need_x: bool,
    need_branch: bool,
    need_gate: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, ...]:
    return (
        total.new_empty(total.shape if need_x else 0),
        *_fake_backward(total, branch, gate, keep, need_branch, need_gate),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape if need_bias else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, branch, gate, keep = inputs[:4]
    # the branch is read for the gradient of the gate only
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, keep)


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, branch, gate, keep, weight = inputs[:5]
    total, _, *statistics = output
    mean, rstd = statistics if len(statistics) == 2 else (None, statistics[0])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*statistics)
    ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gate, keep, total, weight, mean, rstd)


def _gate_backward(
    ctx: Any, grad: Optional[torch.Tensor], saved: tuple[Optional[torch.Tensor], ...]
) -> tuple[Any, Any, Any]:
    """The gradients of x, branch and gate from that of the sum."""
    need_branch, need_gate = ctx.needs_input_grad[1:3]
    if grad is None or not (need_branch or need_gate):
        return grad, None, None
    grad_branch, grad_gate = torch.ops.megamm.gated_residual_backward(grad, *saved, need_branch, need_gate)
    return grad, grad_branch if need_branch else None, grad_gate if need_gate else None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return (*_gate_backward(ctx, grad, ctx.saved_tensors), None)


def _norm_backward(
    ctx: Any, grad_sum: Optional[torch.Tensor], grad: Optional[torch.Tensor], *_: Any
) -> tuple[Any, ...]:
    branch, gate, keep, total, weight, mean, rstd = ctx.saved_tensors
    num_inputs = len(ctx.needs_input_grad)
    if grad is None:  # nobody used the norm
        return (*_gate_backward(ctx, grad_sum, (branch, gate, keep)), *[None] * (num_inputs - 3))
    need_x, need_branch, need_gate, _, need_weight, need_bias = ctx.needs_input_grad[:6]
    needs = (need_x, need_branch, need_gate, need_weight, need_bias if mean is not None else False)
    grads = torch.ops.megamm.gated_residual_norm_backward(
        grad, grad_sum, total, branch, gate, keep, weight, mean, rstd, *needs
    )
    wanted = [g if need else None for g, need in zip(grads, needs, strict=True)]
    affine = wanted[3:] if mean is not None else wanted[3:4]
    return (*wanted[:3], None, *affine, None)


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::gated_residual", _fake_sum)
    torch.library.register_fake("megamm::gated_residual_rms_norm", _fake_rms)
    torch.library.register_fake("megamm::gated_residual_layer_norm", _fake_layer)
    torch.library.register_fake("megamm::gated_residual_backward", _fake_backward)
    torch.library.register_fake("megamm::gated_residual_norm_backward", _fake_norm_backward)
    torch.library.register_autograd("megamm::gated_residual", _backward, setup_context=_save)
    for _norm in ("rms", "layer"):
        torch.library.register_autograd(
            f"megamm::gated_residual_{_norm}_norm", _norm_backward, setup_context=_save_norm
        )
