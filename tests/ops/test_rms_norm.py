"""RMSNorm: the fused operator and its fallback against the definition, computed in fp64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megamm import ops
from megamm.ops.rms_norm import rms_norm, rms_norm_add, rms_norm_add_ref, rms_norm_ref
from tests.ops import norms

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-5
SHAPES = [(1, 1), (3, 5, 67), (2, 4096), (130, 17), (2, 3, 4, 8), (700, 33), (64,), (5, 16385)]
# Largest error, relative to the largest element (absolute below 1: gradients of short rows cancel).
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def definition(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Equation 4 of arXiv:1910.07467, in fp64."""
    x, weight = x.double(), weight.double()
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """x, weight and the gradient of y."""
    x = torch.randn(shape, device=device) * 3
    weight = torch.rand(shape[-1], device=device) + 0.5
    grad = torch.randn(shape, device=device)
    return [tensor.to(dtype) for tensor in (x, weight, grad)]


def run(norm: Norm, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = norm(x, weight, EPS)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))]


def assert_matches(norm: Norm, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    expected = run(definition, *(tensor.double() for tensor in inputs))
    for name, got, want in zip(("y", "grad x", "grad weight"), run(norm, *inputs), expected, strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == dtype, name
        error = (got.double() - want).abs().max() / want.abs().max().clamp(min=1)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.2e}"


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_ref])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(norm: Norm, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_matches(norm, make_inputs(shape, dtype), dtype)


@pytest.mark.parametrize("norm", [rms_norm, rms_norm_ref])
def test_bf16_is_rounded_once(norm: Norm) -> None:
    """The result is the fp32 result, rounded: nothing in between is."""
    x, weight, _ = make_inputs((37, 129), torch.bfloat16)
    exact = definition(x, weight, EPS)
    nearest = exact.to(torch.bfloat16).double()
    got = norm(x, weight, EPS).double()
    assert ((got - exact).abs() <= (nearest - exact).abs() + 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_may_stay_in_fp32(dtype: torch.dtype) -> None:
    x, _, grad = make_inputs((9, 40), dtype)
    weight = torch.rand(40) + 0.5
    y, grad_x, grad_weight = run(rms_norm, x, weight, grad)
    want = run(definition, x.double(), weight.double(), grad.double())
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(grad_weight.double(), want[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), want[0], rtol=2**-8, atol=1e-6)


def strided_views() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Views of a [6, 8, 96] tensor that have a last dimension of 32."""
    return {
        "slice of rows": lambda t: t[..., 32:64],
        "every third element": lambda t: t[..., ::3],
        "transposed leading": lambda t: t.transpose(0, 1)[..., :32],
        "transposed last": lambda t: (
            t.reshape(-1, 32, 4).transpose(1, 2).contiguous().transpose(1, 2)[:, :, 0]
        ),
        "unaligned": lambda t: t.flatten()[1:65].view(2, 32),
        "expanded": lambda t: t[:1, :1, :32].expand(3, 5, 32),
    }


@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_need_not_be_contiguous(view: str, dtype: torch.dtype) -> None:
    x = strided_views()[view](torch.randn(6, 8, 96).to(dtype))
    _, weight, _ = make_inputs((32,), dtype)
    grad = strided_views()[view](torch.randn(6, 8, 96).to(dtype))
    assert view == "unaligned" or not x.is_contiguous()
    assert_matches(rms_norm, [x, weight.repeat_interleave(2)[::2], grad], dtype)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (0,)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    x, weight, grad = make_inputs(shape, torch.float32)
    y, grad_x, grad_weight = run(rms_norm, x, weight, grad)
    assert y.shape == grad_x.shape == shape
    assert torch.equal(grad_weight, torch.zeros(shape[-1]))


def test_extreme_rows_stay_finite() -> None:
    x = torch.tensor([[0.0] * 64, [1e18] * 64, [1e-30] * 64])
    y = rms_norm(x, torch.ones(64), EPS)
    torch.testing.assert_close(y, definition(x, torch.ones(64), EPS).float(), rtol=1e-6, atol=0)


def test_wrong_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is \[1\]"):
        rms_norm(torch.randn(4, 8), torch.ones(1), EPS)


def test_gradcheck() -> None:
    x = torch.randn(3, 4, 19, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(19, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, EPS), (x, weight))


@fused
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_opcheck(trained: tuple[bool, bool]) -> None:
    x, weight, _ = make_inputs((4, 7, 24), torch.float32)
    args = (x.requires_grad_(trained[0]), weight.requires_grad_(trained[1]), EPS)
    torch.library.opcheck(torch.ops.megamm.rms_norm.default, args)


@fused
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_opcheck_of_the_backward(needs: tuple[bool, bool]) -> None:
    x, weight, grad = make_inputs((4, 7, 24), torch.bfloat16)
    rstd = torch.rand(4, 7) + 0.1
    torch.library.opcheck(torch.ops.megamm.rms_norm_backward.default, (grad, x, weight, rstd, *needs))


@fused
def test_gradients_that_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen norm weight must not cost the sum over rows, a frozen input not its gradient."""
    x, weight, grad = make_inputs((64, 32), torch.float32)
    _, rstd = torch.ops.megamm.rms_norm(x, weight, EPS)
    both = torch.ops.megamm.rms_norm_backward(grad, x, weight, rstd, True, True)
    only_x = torch.ops.megamm.rms_norm_backward(grad, x, weight, rstd, True, False)
    only_weight = torch.ops.megamm.rms_norm_backward(grad, x, weight, rstd, False, True)
    assert only_x[1].numel() == 0 and only_weight[0].numel() == 0
    assert torch.equal(only_x[0], both[0]) and torch.equal(only_weight[1], both[1])
    x.requires_grad_()
    rms_norm(x, weight, EPS).backward(grad)
    assert torch.equal(x.grad, both[0]) and weight.grad is None


@fused
def test_bad_arguments_of_the_operator_are_refused() -> None:
    x, weight, grad = make_inputs((4, 8), torch.float32)
    _, rstd = torch.ops.megamm.rms_norm(x, weight, EPS)
    with pytest.raises(RuntimeError, match="the last dimension of x is 8"):
        torch.ops.megamm.rms_norm(x, weight[:4], EPS)
    with pytest.raises(RuntimeError, match="expected that of x"):
        torch.ops.megamm.rms_norm(x, weight.half(), EPS)
    with pytest.raises(RuntimeError, match="grad is"):
        torch.ops.megamm.rms_norm_backward(grad[:2], x, weight, rstd, True, True)
    with pytest.raises(RuntimeError, match="rstd is not what the forward returned"):
        torch.ops.megamm.rms_norm_backward(grad, x, weight, rstd[:2], True, True)


def test_result_depends_neither_on_the_run_nor_on_the_number_of_threads() -> None:
    inputs = make_inputs((3000, 65), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(rms_norm, *inputs))
    finally:
        torch.set_num_threads(threads)
    if not ops.extension_built():
        results = results[2:]  # torch promises it for the same number of threads only
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_rows_do_not_depend_on_each_other() -> None:
    """The same row gives the same bits wherever it stands: layouts that cut the sequence change nothing."""
    x, weight, _ = make_inputs((10, 100), torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, EPS)[7], rms_norm(x[7], weight, EPS))


def test_meta_tensors_have_the_right_shape() -> None:
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = rms_norm(x, torch.empty(8, device="meta", dtype=torch.bfloat16), EPS)
    y.backward(torch.empty_like(y))
    assert y.shape == x.shape and y.dtype == x.dtype
    assert x.grad is not None and x.grad.shape == x.shape


FALLBACK = """
import importlib.util, sys, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "megamm._C" else find_spec(name, *rest)
from megamm import ops
assert not ops.extension_built(), ops.extension_status()
from megamm.ops.rms_norm import rms_norm
inputs = torch.load(sys.argv[1])
x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
y = rms_norm(x, weight, 1e-5)
y.backward(inputs["grad"])
torch.save({"y": y.detach(), "x": x.grad, "weight": weight.grad}, sys.argv[2])
print(ops.extension_status())
"""


@fused
def test_fallback_gives_the_same(tmp_path: Path) -> None:
    """A process that finds no extension computes the same numbers."""
    x, weight, grad = make_inputs((33, 50), torch.float32)
    torch.save({"x": x, "weight": weight, "grad": grad}, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, tmp_path / "inputs.pt", tmp_path / "outputs.pt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the extension is not built" in done.stdout
    outputs = torch.load(tmp_path / "outputs.pt")
    for got, want in zip(run(rms_norm, x, weight, grad), outputs.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


class TestCompiled:
    pytestmark = norms.compiled

    def test_cuda_kernel_compiles(self, arch: str, tmp_path: Path) -> None:
        norms.assert_kernel_compiles("rms_norm", arch, tmp_path, kernels=40)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (513, 4096), (65, 8192), (9, 16384), (3, 70000), (4099, 128)])
def test_cuda_matches_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, dtype, "cuda")
    assert_matches(rms_norm, inputs, dtype)
    again = [run(rms_norm, *inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("view", list(strided_views()))
def test_cuda_inputs_need_not_be_contiguous(view: str) -> None:
    x, grad = (strided_views()[view](torch.randn(6, 8, 96, device="cuda")) for _ in range(2))
    assert_matches(rms_norm, [x, torch.rand(32, device="cuda"), grad], torch.float32)


def add_definition(
    rounding: torch.dtype, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of the sum as it is rounded (its gradient passes through that), and the sum."""
    total = x + residual
    total = total + (total.to(rounding).double() - total).detach()
    return definition(total, weight, EPS), total


def make_add_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x, weight, grad = make_inputs(shape, dtype, device)
    return [x, torch.randn_like(x), weight], [grad, torch.randn_like(grad)]


def added(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_add(x, residual, weight, EPS)


def added_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_add_ref(x, residual, weight, EPS)


@pytest.mark.parametrize("op", [added, added_ref])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [*SHAPES, (0, 16), (3, 0)])
def test_add_matches_the_definition(op: norms.Op, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs, grads = make_add_inputs(shape, dtype)
    # plain torch rounds what comes through the norm, then its sum with the other gradient
    norms.assert_matches(op, partial(add_definition, dtype), inputs, grads, 2 if op is added_ref else 1)


@pytest.mark.parametrize("view", list(norms.strided_views()))
def test_add_takes_inputs_that_are_not_contiguous(view: str) -> None:
    tensors = [norms.strided_views()[view](torch.randn(6, 8, 96)) for _ in range(4)]
    inputs = [*tensors[:2], torch.rand(32) + 0.5]
    norms.assert_matches(added, partial(add_definition, torch.float32), inputs, tensors[2:])


@pytest.mark.parametrize("used", [0, 1])
def test_add_when_only_one_output_is_used(used: int) -> None:
    inputs, grads = make_add_inputs((7, 40), torch.float32)
    got, want = (
        run_leaves(op, inputs, used, grads[used])
        for op in (added, lambda x, r, w: (rms_norm(x + r, w, EPS), x + r))
    )
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def run_leaves(
    op: norms.Op, inputs: list[torch.Tensor], used: int, grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """The gradients of the inputs through one of the outputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    op(*leaves)[used].backward(grad)
    return [leaf.grad for leaf in leaves]


def test_add_gradcheck() -> None:
    inputs, _ = make_add_inputs((3, 4, 19), torch.float64)
    assert torch.autograd.gradcheck(added, [t.requires_grad_() for t in inputs])


@fused
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, False, True)])
def test_add_opcheck(trained: tuple[bool, ...]) -> None:
    inputs, (grad, grad_sum) = make_add_inputs((4, 7, 24), torch.bfloat16)
    args = [t.requires_grad_(need) for t, need in zip(inputs, trained, strict=True)]
    torch.library.opcheck(torch.ops.megamm.rms_norm_add.default, (*args, EPS))
    rstd = torch.rand(4, 7) + 0.1
    for other in (grad_sum, None):
        saved = (grad, other, inputs[0].detach(), inputs[2].detach(), rstd, trained[0], trained[2])
        torch.library.opcheck(torch.ops.megamm.rms_norm_add_backward.default, saved)


def test_add_is_independent_of_threads() -> None:
    norms.assert_independent_of_threads(added, *make_add_inputs((3000, 65), torch.float32))


def test_add_refuses_a_residual_unlike_x() -> None:
    with pytest.raises(ValueError, match=r"residual is torch.float32 \[4, 1\]"):
        rms_norm_add(torch.randn(4, 8), torch.randn(4, 1), torch.ones(8), EPS)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", norms.CUDA_SHAPES)
def test_cuda_add_matches_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs, grads = make_add_inputs(shape, dtype, "cuda")
    norms.assert_matches(added, partial(add_definition, dtype), inputs, grads)
