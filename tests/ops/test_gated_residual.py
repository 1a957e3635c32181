"""Tanh-gated residual, alone and followed by a norm: fused operators and fallbacks against fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Optional

import pytest
import torch

from megamm.ops import gated_residual as module
from megamm.ops.layer_norm import layer_norm
from megamm.ops.rms_norm import rms_norm
from tests.ops.norms import (
    CUDA_SHAPES,
    EPS,
    SHAPES,
    TOLERANCE,
    Op,
    assert_independent_of_threads,
    assert_kernel_compiles,
    assert_matches,
    compiled,
    fused,
    run,
    strided_views,
)

KINDS = ["alone", "rms", "layer"]
Keep = Optional[torch.Tensor]


def make_op(kind: str, keep: Keep, ending: str = "") -> Op:
    """op(x, branch, gate, *parameters of the norm) -> sum or (y, sum); ending "_ref": in plain torch."""
    if kind == "alone":
        return lambda x, b, g: getattr(module, f"gated_residual{ending}")(x, b, g, keep)
    op: Callable[..., Any] = getattr(module, f"gated_residual_{kind}_norm{ending}")
    return lambda x, b, g, *affine: op(x, b, g, *affine, EPS, keep)


def definition(
    kind: str,
    keep: Keep,
    rounding: torch.dtype,
    x: torch.Tensor,
    b: torch.Tensor,
    g: torch.Tensor,
    *affine: Any,
) -> Any:
    """Section 2.2 of Alayrac et al. 2022. The sum is rounded once (its gradient passes through that)."""
    total = x + torch.tanh(g) * b * (1 if keep is None else keep[..., None])
    total = total + (total.to(rounding).double() - total).detach()
    if kind == "alone":
        return total
    centered = total - total.mean(-1, keepdim=True) if kind == "layer" else total
    y = centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + EPS) * affine[0]
    return (y + affine[1] if kind == "layer" else y), total


def make_inputs(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, gates: int, device: str = "cpu"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    width = shape[-1]
    x, branch, *grads = (torch.randn(shape, device=device) for _ in range(2 if kind == "alone" else 4))
    grads = grads or [torch.randn(shape, device=device)]
    x = x * 3
    if gates == 1:  # a sum over everything: without cancellation
        branch, grads[-1] = branch.abs(), grads[-1].abs()
    if width <= 32:  # nearly equal elements would amplify rounding; the tolerance is not about that
        x = x + torch.arange(width, device=device) * 2
    affine = [torch.rand(width, device=device) + 0.5, torch.randn(width, device=device)][: KINDS.index(kind)]
    inputs = [x, branch, torch.randn(gates, device=device), *affine]
    return [t.to(dtype) for t in inputs], [t.to(dtype) for t in grads][: 1 if kind == "alone" else 2]


def make_keep(shape: tuple[int, ...], device: str = "cpu") -> torch.Tensor:
    return torch.rand(shape[:-1], device=device) > 0.4


def check(
    op_of: Op,
    kind: str,
    keep: Keep,
    inputs: list[torch.Tensor],
    grads: list[torch.Tensor],
    roundings: int = 1,
) -> None:
    assert_matches(
        op_of(kind, keep), partial(definition, kind, keep, inputs[0].dtype), inputs, grads, roundings
    )


@pytest.mark.parametrize("ending", ["", "_ref"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_definition(kind: str, vector: bool, dtype: torch.dtype, ending: str) -> None:
    # a single element is as far from the mean as rounding
    for shape in SHAPES[1 if kind == "layer" else 0 :]:
        inputs, grads = make_inputs(kind, shape, dtype, shape[-1] if vector else 1)
        for keep in (None, make_keep(shape)):
            # plain torch rounds the gradient of the sum before the gate uses it
            check(partial(make_op, ending=ending), kind, keep, inputs, grads, 2 if ending else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_fused_with_the_norm_is_the_same_as_one_after_the_other(kind: str, dtype: torch.dtype) -> None:
    inputs, (grad, _) = make_inputs(kind, (50, 70), dtype, 1)

    def apart(x: torch.Tensor, b: torch.Tensor, g: torch.Tensor, *affine: torch.Tensor) -> torch.Tensor:
        total = module.gated_residual(x, b, g)
        return rms_norm(total, *affine, EPS) if kind == "rms" else layer_norm(total, *affine, EPS)

    together = run(lambda *args: make_op(kind, None)(*args)[0], inputs, [grad])
    for one, other in zip(together, run(apart, inputs, [grad]), strict=True):
        # apart, the gradient of the sum is rounded before the gate uses it
        torch.testing.assert_close(one, other, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_only_the_sum_is_used(kind: str) -> None:
    """The norm then costs no backward, and its parameters get no gradient."""
    inputs, (grad, _) = make_inputs(kind, (6, 20), torch.float32, 1)
    leaves = [t.requires_grad_() for t in inputs]
    make_op(kind, None)(*leaves)[1].backward(grad)
    alone = run(make_op("alone", None), inputs[:3], [grad])
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, alone[1:], strict=False))
    assert all(leaf.grad is None for leaf in leaves[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_kept_pass_unchanged(kind: str) -> None:
    """Even where the branch is NaN; what broadcasts to the rows is a mask, too."""
    inputs, grads = make_inputs(kind, (3, 4, 40), torch.bfloat16, 40)
    keep = torch.tensor([True, False, True, False])
    inputs[1][:, 1] = torch.nan
    for mask in (keep[:, None], keep.expand(3, 4), keep.expand(3, 4)[..., None]):
        out = run(make_op(kind, mask), inputs, grads)
        total, grad_branch = out[len(grads) - 1], out[len(grads) + 1]
        assert torch.equal(total[:, 1], inputs[0][:, 1]) and not out[-1].isnan().any()
        assert (grad_branch[:, ~keep] == 0).all() and (grad_branch[:, keep] != 0).any()


def test_gate_of_zero_starts_as_the_identity() -> None:
    (x, branch, _), grads = make_inputs("alone", (5, 6), torch.float32, 1)
    total, grad_x, grad_branch, grad_gate = run(make_op("alone", None), [x, branch, torch.zeros(1)], grads)
    assert torch.equal(total, x) and torch.equal(grad_x, grads[0]) and not grad_branch.any()
    torch.testing.assert_close(grad_gate, (grads[0] * branch).sum()[None])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_may_stay_in_fp32(kind: str) -> None:
    inputs, grads = make_inputs(kind, (9, 40), torch.bfloat16, 40)
    inputs = [*inputs[:2], *(t.float() for t in inputs[2:])]
    check(make_op, kind, make_keep((9, 40)), inputs, grads)


@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_need_not_be_contiguous(kind: str, view: str) -> None:
    inputs, grads = make_inputs(kind, (6, 8, 96), torch.float32, 32)
    strided = strided_views()[view]
    affine = [t.repeat_interleave(2)[::2][:32] for t in inputs[3:]]
    inputs = [strided(inputs[0]), strided(inputs[1]), inputs[2], *affine]
    check(make_op, kind, None, inputs, [strided(g) for g in grads])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (0,)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_input(kind: str, shape: tuple[int, ...]) -> None:
    out = run(make_op(kind, make_keep(shape)), *make_inputs(kind, shape, torch.float32, 1))
    assert out[0].shape == shape and torch.equal(out[3 if kind == "alone" else 4], torch.zeros(1))


def test_wrong_arguments_are_refused() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"branch is torch.float32 \[4, 1\]"):
        module.gated_residual(x, x[:, :1], torch.zeros(1))
    with pytest.raises(ValueError, match=r"gate is \[4\]"):
        module.gated_residual(x, x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"keep is \[3, 1\]"):
        module.gated_residual(x, x, torch.zeros(1), torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"keep is torch.float32"):
        module.gated_residual(x, x, torch.zeros(1), torch.ones(4))


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, vector: bool) -> None:
    inputs, _ = make_inputs(kind, (3, 2, 19), torch.float64, 19 if vector else 1)
    assert torch.autograd.gradcheck(
        make_op(kind, make_keep((3, 2, 19))), [t.requires_grad_() for t in inputs]
    )


@fused
@pytest.mark.parametrize("trained", [0b111, 0b101, 0b010, 0b100])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, trained: int) -> None:
    inputs, _ = make_inputs(kind, (4, 7, 24), torch.float32, 1)
    x, branch, gate = (t.requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(inputs[:3]))
    affine = [t.requires_grad_() for t in inputs[3:]]
    name = "gated_residual" if kind == "alone" else f"gated_residual_{kind}_norm"
    eps = () if kind == "alone" else (EPS,)
    op = getattr(torch.ops.megamm, name).default
    torch.library.opcheck(op, (x, branch, gate, make_keep(x.shape), *affine, *eps))


@fused
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_nobody_needs_are_not_computed(kind: str) -> None:
    inputs, grads = make_inputs(kind, (40, 24), torch.bfloat16, 24)
    keep = make_keep((40, 24))
    every = run(make_op(kind, keep), inputs, grads)[len(grads) :]
    for i in range(len(inputs)):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        out = make_op(kind, keep)(*leaves)
        outputs = [o for o in ([out] if kind == "alone" else out) if o.requires_grad]
        (got,) = torch.autograd.grad(outputs, leaves[i], grads[: len(outputs)])
        assert torch.equal(got, every[i]), i
    if kind == "alone":
        none = torch.ops.megamm.gated_residual_backward(grads[0], None, inputs[2], keep, True, False)
        assert none[1].numel() == 0 and torch.equal(none[0], every[1])
        torch.library.opcheck(
            torch.ops.megamm.gated_residual_backward.default,
            (grads[0], inputs[1], inputs[2], keep, True, True),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_result_depends_neither_on_the_run_nor_on_the_number_of_threads(kind: str) -> None:
    for gates in (1, 65):
        assert_independent_of_threads(
            make_op(kind, None), *make_inputs(kind, (3000, 65), torch.float32, gates)
        )


class TestCompiled:
    pytestmark = compiled

    def test_cuda_kernel_compiles(self, arch: str, tmp_path: Path) -> None:
        assert_kernel_compiles("gated_residual", arch, tmp_path, kernels=90)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_matches_the_definition(kind: str, vector: bool, dtype: torch.dtype) -> None:
    for shape in CUDA_SHAPES:
        inputs, grads = make_inputs(kind, shape, dtype, shape[-1] if vector else 1, "cuda")
        for keep in (None, make_keep(shape, "cuda")):
            check(make_op, kind, keep, inputs, grads)
        again = [run(make_op(kind, None), inputs, grads) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_inputs_need_not_be_contiguous(kind: str, view: str) -> None:
    inputs, grads = make_inputs(kind, (6, 8, 96), torch.float32, 32, "cuda")
    strided = strided_views()[view]
    inputs = [strided(inputs[0]), strided(inputs[1]), inputs[2], *(t[:32] for t in inputs[3:])]
    check(make_op, kind, None, inputs, [strided(g) for g in grads])
