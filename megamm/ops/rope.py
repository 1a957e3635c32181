"""Rotary positions (Su et al. 2021, arXiv:2104.09864), half-split as GPT-NeoX and LLaMA have them.

Element i of the first half of a head and element i of the second half are a point that turns by the angle
position * theta^(-2 i / R). The gradient turns back by it; nothing but the table of cosines and sines is
kept. Everything is computed in fp32 (fp64 for fp64 input) and rounded once. (megatron-core and Hugging Face
round the cosines and sines to the dtype of the heads, and then the products: in fp32 the same numbers, in
bf16 three roundings more.)

Shapes: S positions of the sequence, B rows of the batch, D head size, R <= D the part of a head that turns
(its first elements), P rows of the table. [T, heads, D] stands for [T, 1, heads, D] everywhere.
"""

from __future__ import annotations

from typing import Any, Optional

import torch

from megamm.ops import call, fused_devices

_FUSED_DEVICES = fused_devices("rope")
_FUSED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "meta": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
}
Heads = tuple[torch.Tensor, torch.Tensor]
SplitHeads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rope_table(angles: torch.Tensor) -> torch.Tensor:
    """The table that the other functions take, of any scaling of the positions.

    Args:
        angles: [P, R / 2], radians; megatron's rotary_pos_emb [P, 1, 1, R] holds them twice, side by side:
            `rotary[:, 0, 0, : R // 2]`.

    Returns:
        [P, R] fp32: cosines, then sines.
    """
    angles = angles.detach().float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: Optional[torch.Tensor] = None
) -> Heads:
    """Turn queries and keys by their positions, fused where the extension has a kernel for it.

    Args:
        q, k: [S, B, heads, D], in the same dtype; k may have fewer heads. Any strides (heads that are not
            contiguous are copied).
        table: [P, R] fp32 (`rope_table`). It gets no gradient.
        positions: [S] or [S, B], integers: each token's row of the table. None: its position in S.

    Returns:
        The turned q and k, contiguous where fused. Differentiable; if only one needs a gradient, only that
        one is computed.

    Raises:
        ValueError: shapes that do not belong together.
        IndexError: a position that is not in the table (on CUDA the kernel stops, as with torch's indexing).
    """
    _check(q, k, table, positions, q.shape[-1])
    if _is_fused(q, k, table):
        positions = None if positions is None else positions.long()
        return torch.ops.megamm.rope(q, k, table, positions, False)
    return _rotated(q, table, positions), _rotated(k, table, positions)


def rope_qkv(
    qkv: torch.Tensor, head_dim: int, table: torch.Tensor, positions: Optional[torch.Tensor] = None
) -> SplitHeads:
    """Split the output of the fused projection and turn its queries and keys, in one pass.

    In the backward pass the three gradients become that of `qkv` in one pass, too. With grouped queries this
    also saves the copy that makes the queries of all groups one tensor.

    Args:
        qkv: [S, B, groups, (n + 2) D]: n queries, a key and a value for each group, as megatron's linear_qkv
            writes them.
        head_dim: D.
        table, positions: as for `rope`.

    Returns:
        q [S, B, groups * n, D], k and v [S, B, groups, D]. Differentiable once.

    Raises:
        ValueError, IndexError: as `rope`.
    """
    width = qkv.shape[-1]
    if qkv.dim() not in (3, 4) or qkv.shape[-2] == 0 or width % head_dim or width < 3 * head_dim:
        raise ValueError(f"rope: qkv is {list(qkv.shape)}, expected [..., groups, (n + 2) * {head_dim}]")
    _check(qkv, qkv, table, positions, head_dim)
    if _is_fused(qkv, qkv, table):
        positions = None if positions is None else positions.long()
        return call(torch.ops.megamm.rope_qkv, qkv, head_dim, table, positions)
    return rope_qkv_ref(qkv, head_dim, table, positions)


def rope_ref(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: Optional[torch.Tensor] = None
) -> Heads:
    """`rope` in plain torch: what the kernels are tested against and the fallback without them."""
    return _rotated(q, table, positions), _rotated(k, table, positions)


def rope_qkv_ref(
    qkv: torch.Tensor, head_dim: int, table: torch.Tensor, positions: Optional[torch.Tensor] = None
) -> SplitHeads:
    """`rope_qkv` in plain torch."""
    q, k, v = qkv.split([qkv.shape[-1] - 2 * head_dim, head_dim, head_dim], dim=-1)
    q = q.reshape(*q.shape[:-2], q.shape[-2] * q.shape[-1] // head_dim, head_dim)
    return *rope_ref(q, k, table, positions), v


def _rotated(x: torch.Tensor, table: torch.Tensor, positions: Optional[torch.Tensor]) -> torch.Tensor:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    if positions is None:
        rows = table[: x.shape[0]]
    else:  # unlike indexing, this refuses negative positions
        rows = table.index_select(0, positions.flatten()).unflatten(0, positions.shape)
    # [S, 1 or B, 1, R / 2], or [T, 1, R / 2]
    rows = rows.view(*rows.shape[:-1], *[1] * (x.dim() - rows.dim()), rows.shape[-1])
    cosine, sine = rows.to(accumulate).chunk(2, dim=-1)
    half = table.shape[1] // 2
    first, second, rest = x.to(accumulate).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return torch.cat(turned, dim=-1).to(x.dtype)


def _check(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: Optional[torch.Tensor], head_dim: int
) -> None:
    leading = q.shape[:-2]
    if q.dim() not in (3, 4) or k.shape[:-2] != leading or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"rope: q is {list(q.shape)}, k is {list(k.shape)}; expected the same [S, B, heads, D]"
        )
    if table.dim() != 2 or table.shape[1] % 2 or table.shape[1] > head_dim:
        raise ValueError(f"rope: table is {list(table.shape)}, expected [P, an even number up to {head_dim}]")
    if positions is None:
        if len(table) < leading[0]:
            raise ValueError(f"rope: the table has {len(table)} rows for a sequence of {leading[0]}")
    elif positions.shape not in (leading, leading[:1]):
        raise ValueError(f"rope: positions are {list(positions.shape)}, expected {list(leading)}")


def _is_fused(q: torch.Tensor, k: torch.Tensor, table: torch.Tensor) -> bool:
    device = q.device.type
    return (
        device in _FUSED_DEVICES
        and q.dtype in _FUSED_DTYPES[device]
        and k.dtype == q.dtype
        and table.dtype == torch.float32
    )


def _fake(q: torch.Tensor, k: torch.Tensor, *_: Any) -> Heads:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Heads) -> None:
    _, _, table, positions, ctx.inverse = inputs
    ctx.save_for_backward(table, positions)


def _backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[Any, ...]:
    table, positions = ctx.saved_tensors
    need_q, need_k = ctx.needs_input_grad[:2]
    # without heads there is nothing to do
    grad_q = grad_q if need_q else grad_q[..., :0, :]
    grad_k = grad_k if need_k else grad_k[..., :0, :]
    grad_q, grad_k = torch.ops.megamm.rope(grad_q, grad_k, table, positions, not ctx.inverse)
    return grad_q if need_q else None, grad_k if need_k else None, None, None, None


def _fake_qkv(qkv: torch.Tensor, head_dim: int, *_: Any) -> SplitHeads:
    leading, groups = qkv.shape[:-2], qkv.shape[-2]
    per_group = qkv.shape[-1] // head_dim - 2
    q = qkv.new_empty((*leading, groups * per_group, head_dim))
    return q, qkv.new_empty((*leading, groups, head_dim)), qkv.new_empty((*leading, groups, head_dim))


def _fake_qkv_backward(
    grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor, *_: Any
) -> torch.Tensor:
    groups, head_dim = grad_k.shape[-2:]
    per_group = grad_q.shape[-2] // groups
    return grad_q.new_empty((*grad_k.shape[:-1], (per_group + 2) * head_dim))


def _save_for_qkv_backward(ctx: Any, inputs: tuple[Any, ...], output: SplitHeads) -> None:
    _, _, table, positions = inputs
    ctx.save_for_backward(table, positions)


def _qkv_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return torch.ops.megamm.rope_qkv_backward(*grads, *ctx.saved_tensors), None, None, None


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::rope", _fake)
    torch.library.register_autograd("megamm::rope", _backward, setup_context=_save_for_backward)
    torch.library.register_fake("megamm::rope_qkv", _fake_qkv)
    torch.library.register_fake("megamm::rope_qkv_backward", _fake_qkv_backward)
    torch.library.register_autograd("megamm::rope_qkv", _qkv_backward, setup_context=_save_for_qkv_backward)
