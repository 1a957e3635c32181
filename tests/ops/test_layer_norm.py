"""Layer norm: the fused operator and its fallback against the definition, computed in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamm.ops.layer_norm import LayerNorm, layer_norm, layer_norm_ref
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


def definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Equations 3 and 4 of arXiv:1607.06450, with eps under the root."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + EPS) * weight + bias


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, weight, bias, EPS)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return layer_norm_ref(x, weight, bias, EPS)


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x, grad = torch.randn(shape, device=device) * 3 + 1, torch.randn(shape, device=device)
    if shape[-1] <= 32:  # nearly equal elements would amplify rounding; the tolerance is not about that
        x = x + torch.arange(shape[-1], device=device) * 2
    weight, bias = torch.rand(shape[-1], device=device) + 0.5, torch.randn(shape[-1], device=device)
    return [t.to(dtype) for t in (x, weight, bias)], [grad.to(dtype)]


@pytest.mark.parametrize("op", [ours, reference])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES[1:])  # a single element is as far from the mean as rounding
def test_matches_the_definition(op: Op, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_matches(op, definition, *make_inputs(shape, dtype))


def test_matches_torch() -> None:
    inputs, grads = make_inputs((40, 96), torch.float32)
    theirs = run(lambda x, w, b: torch.nn.functional.layer_norm(x, (96,), w, b, EPS), inputs, grads)
    for got, want in zip(run(ours, inputs, grads), theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("outlier", ["first", "last", "none"])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_mean_far_from_zero_and_outliers(offset: float, outlier: str) -> None:
    """The variance comes from one pass over the row, whose guess of the mean such rows lead astray."""
    x = torch.randn(5, 4000, dtype=torch.float64) + offset
    if outlier != "none":
        x[:, : 16 if outlier == "first" else None][:, -16:] = 3000.0
    x = x.float()
    y = layer_norm(x, torch.ones(4000), torch.zeros(4000), EPS)
    exact = definition(x.double(), torch.ones(4000).double(), torch.zeros(4000).double())
    error = (y.double() - exact).abs().max() / exact.abs().max()
    # the mean is not better known than to a rounding of its own
    assert error < (1e-4 if offset and outlier == "none" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_may_stay_in_fp32(dtype: torch.dtype) -> None:
    (x, _, _), grads = make_inputs((9, 40), dtype)
    inputs = [x, torch.rand(40) + 0.5, torch.randn(40)]
    assert [t.dtype for t in run(ours, inputs, grads)] == [dtype, dtype, torch.float32, torch.float32]
    assert_matches(ours, definition, inputs, grads)


@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_need_not_be_contiguous(view: str, dtype: torch.dtype) -> None:
    x, grad = (strided_views()[view](torch.randn(6, 8, 96).to(dtype)) for _ in range(2))
    (_, weight, bias), _ = make_inputs((32,), dtype)
    assert_matches(ours, definition, [x, weight.repeat_interleave(2)[::2], bias], [grad])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (0,)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    y, grad_x, grad_weight, grad_bias = run(ours, *make_inputs(shape, torch.float32))
    assert y.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(shape[-1])) and torch.equal(grad_bias, torch.zeros(shape[-1]))


def test_constant_rows_give_the_bias() -> None:
    for width in (7, 16, 100):
        x, bias = torch.full((3, width), 0.1), torch.randn(width)
        torch.testing.assert_close(ours(x, torch.ones(width), bias), bias.expand(3, -1), rtol=0, atol=1e-4)


def test_wrong_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bias is \[1\]"):
        layer_norm(torch.randn(4, 8), torch.ones(8), torch.zeros(1), EPS)


def test_gradcheck() -> None:
    (x, weight, bias), _ = make_inputs((3, 4, 19), torch.float64)
    assert torch.autograd.gradcheck(ours, [t.requires_grad_() for t in (x, weight, bias)])


@fused
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck(trained: tuple[bool, ...]) -> None:
    inputs, _ = make_inputs((4, 7, 24), torch.float32)
    args = [t.requires_grad_(need) for t, need in zip(inputs, trained, strict=True)]
    torch.library.opcheck(torch.ops.megamm.layer_norm.default, (*args, EPS))


@fused
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, True), (False, True, False)])
def test_gradients_that_nobody_needs_are_not_computed(needs: tuple[bool, ...]) -> None:
    (x, weight, bias), (grad,) = make_inputs((64, 32), torch.bfloat16)
    _, mean, rstd = torch.ops.megamm.layer_norm(x, weight, bias, EPS)
    saved = (grad, x, weight, mean, rstd)
    torch.library.opcheck(torch.ops.megamm.layer_norm_backward.default, (*saved, *needs))
    every = torch.ops.megamm.layer_norm_backward(*saved, True, True, True)
    some = torch.ops.megamm.layer_norm_backward(*saved, *needs)
    for one, full, need in zip(some, every, needs, strict=True):
        assert torch.equal(one, full) if need else one.numel() == 0


@fused
def test_bad_arguments_of_the_operator_are_refused() -> None:
    (x, weight, bias), (grad,) = make_inputs((4, 8), torch.bfloat16)
    _, mean, rstd = torch.ops.megamm.layer_norm(x, weight, bias, EPS)
    with pytest.raises(RuntimeError, match="bias is Float, weight is BFloat16"):
        torch.ops.megamm.layer_norm(x, weight, bias.float(), EPS)
    with pytest.raises(RuntimeError, match="mean is not what the forward returned"):
        torch.ops.megamm.layer_norm_backward(grad, x, weight, mean[:2], rstd, True, True, True)


def test_result_depends_neither_on_the_run_nor_on_the_number_of_threads() -> None:
    assert_independent_of_threads(ours, *make_inputs((3000, 65), torch.float32))


def test_rows_do_not_depend_on_each_other() -> None:
    (x, weight, bias), _ = make_inputs((10, 100), torch.bfloat16)
    assert torch.equal(ours(x, weight, bias)[7], ours(x[7], weight, bias))


class TestCompiled:
    pytestmark = compiled

    def test_cuda_kernel_compiles(self, arch: str, tmp_path: Path) -> None:
        assert_kernel_compiles("layer_norm", arch, tmp_path, kernels=30)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", CUDA_SHAPES)
def test_cuda_matches_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, dtype, "cuda")
    assert_matches(ours, definition, *inputs)
    again = [run(ours, *inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("view", list(strided_views()))
def test_cuda_inputs_need_not_be_contiguous(view: str) -> None:
    x, grad = (strided_views()[view](torch.randn(6, 8, 96, device="cuda")) for _ in range(2))
    weight, bias = torch.rand(32, device="cuda"), torch.rand(32, device="cuda")
    assert_matches(ours, definition, [x, weight, bias], [grad])


def test_the_module_is_torchs_in_fp32_and_ours_in_16_bits() -> None:
    module = LayerNorm(64, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    x = torch.randn(500, 64)
    plain = torch.nn.functional.layer_norm(x, (64,), module.weight, module.bias, 1e-5)
    assert torch.equal(module(x), plain)
    half, narrow = LayerNorm(64, eps=1e-5).bfloat16(), x.bfloat16()
    half.load_state_dict(module.state_dict())
    assert torch.equal(half(narrow), layer_norm(narrow, half.weight, half.bias, 1e-5))
