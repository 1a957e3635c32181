"""SwiGLU (Shazeer 2020, arXiv:2002.05202, section 2), forward and backward.

    y = silu(gate) * value        silu(z) = z / (1 + exp(-z))        x = gate | value

Everything is computed in fp32 (fp64 for fp64 input) and rounded once, to the dtype of x. (Plain torch rounds
silu(gate) to the dtype of x before the product: in fp32 the same numbers, in bf16 one rounding more.)
"""

from __future__ import annotations

from typing import Any

import torch

from megamm.ops import call, fused_devices

_FUSED_DEVICES = fused_devices("swiglu")
_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SwiGLU over the last dimension, fused where the extension has a kernel for it.

    Args:
        x: [..., 2 F], the gates first, then the values, as megatron's linear_fc1 writes them; any leading
            shape, any strides (rows that are not contiguous are copied).

    Returns:
        [..., F] in the dtype of x, contiguous where fused. Differentiable once; the backward pass keeps x
        and nothing else.

    Raises:
        ValueError: the last dimension is odd.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(
            f"swiglu: x is {list(x.shape)}, expected an even last dimension (gates, then values)"
        )
    device = x.device.type
    if device in _FUSED_DEVICES and x.dtype in _FUSED_DTYPES[device]:
        return call(torch.ops.megamm.swiglu, x)
    return swiglu_ref(x)


def swiglu_ref(x: torch.Tensor) -> torch.Tensor:
    """The same function in plain torch: what the kernels are tested against and the fallback without them."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    gate, value = x.to(accumulate).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * value).to(x.dtype)


def _fake_forward(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
    return torch.ops.megamm.swiglu_backward(grad, ctx.saved_tensors[0])


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::swiglu", _fake_forward)
    torch.library.register_fake("megamm::swiglu_backward", _fake_backward)
    torch.library.register_autograd("megamm::swiglu", _backward, setup_context=_save_for_backward)
