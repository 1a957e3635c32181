"""Layer norm over the last dimension (Ba et al. 2016, arXiv:1607.06450), forward and backward.

    y = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(mean((x - mean)^2) + eps)

Everything is computed in fp32 (fp64 for fp64 input) and rounded once, to the dtype of x. Unlike torch's
own kernel, the gradients of weight and bias do not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch

from megamm.ops import call, fused_devices
from megamm.ops.rms_norm import FUSED_DTYPES

_FUSED_DEVICES = fused_devices("layer_norm")


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm over the last dimension, fused where the extension has a kernel for it.

    Args:
        x: [..., H], any leading shape, any strides (rows that are not contiguous are copied).
        weight: [H], in the dtype of x or fp32.
        bias: [H], in the dtype of weight.
        eps: added to the variance.

    Returns:
        [..., H] in the dtype of x, contiguous where fused. Differentiable once; the gradient of an input
        that needs none is not computed.

    Raises:
        ValueError: weight or bias is not [H].
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name} is {list(parameter.shape)}, the last dimension of x is {x.shape[-1:]}"
            )
    device = x.device.type
    if (
        device in _FUSED_DEVICES
        and x.dtype in FUSED_DTYPES[device]
        and weight.dtype == bias.dtype
        and weight.dtype in (x.dtype, torch.float32)
    ):
        return call(torch.ops.megamm.layer_norm, x, weight, bias, eps)[0]
    return layer_norm_ref(x, weight, bias, eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch's module, on the fused operator in 16 bits (in which torch's CPU kernels sum the gradients of
    weight and bias). In fp32 it stays torch's, whose rounding the models of other libraries share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)


def layer_norm_ref(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """The same function in plain torch: what the kernels are tested against and the fallback without them."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    x_acc = x.to(accumulate)
    centered = x_acc - x_acc.mean(dim=-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    return (centered * rstd * weight.to(accumulate) + bias.to(accumulate)).to(x.dtype)


def _fake_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    statistics = [x.new_empty(x.shape[:-1], dtype=accumulate) for _ in range(2)]
    return x.new_empty(x.shape), statistics[0], statistics[1]


def _fake_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape if need_bias else 0),
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(inputs[0], inputs[1], mean, rstd)


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad[:3]
    grads = torch.ops.megamm.layer_norm_backward(grad, *ctx.saved_tensors, *needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None)


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::layer_norm", _fake_forward)
    torch.library.register_fake("megamm::layer_norm_backward", _fake_backward)
    torch.library.register_autograd("megamm::layer_norm", _backward, setup_context=_save_for_backward)
