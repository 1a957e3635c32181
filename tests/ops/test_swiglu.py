"""SwiGLU: the fused operator and its fallback against the definition, computed in fp64."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megamm import ops
from megamm.ops.swiglu import swiglu, swiglu_ref
from tests.ops.norms import assert_kernel_compiles

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(2,), (1, 2), (3, 5, 66), (2, 4096), (130, 34), (2, 3, 4, 16), (700, 32), (1, 3 * 4096 * 2 + 14)]
# Largest error, relative to the largest element of the row (absolute below 1: gradients cancel).
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
SwiGLU = Callable[[torch.Tensor], torch.Tensor]


def definition(x: torch.Tensor) -> torch.Tensor:
    """Swish_1(x W) * (x V) of arXiv:2002.05202, equation 6, in fp64; x W first."""
    width = x.shape[-1] // 2
    gate, value = x.double()[..., :width], x.double()[..., width:]
    return gate * torch.sigmoid(gate) * value


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """x and the gradient of y."""
    x = torch.randn(shape, device=device) * 3
    grad = torch.randn(*shape[:-1], shape[-1] // 2, device=device)
    return [x.to(dtype), grad.to(dtype)]


def run(function: SwiGLU, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """y and the gradient of x."""
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, x, grad.to(y.dtype))]


def assert_matches(function: SwiGLU, inputs: list[torch.Tensor], dtype: torch.dtype) -> None:
    expected = run(definition, *(tensor.double() for tensor in inputs))
    for name, got, want in zip(("y", "grad x"), run(function, *inputs), expected, strict=True):
        assert got.shape == want.shape and got.dtype == dtype, name
        error = (got.double() - want).abs().amax(-1) / want.abs().amax(-1).clamp(min=1)
        assert error.max() <= TOLERANCE[dtype], f"{name}: {error.max():.2e}"


@pytest.mark.parametrize("function", [swiglu, swiglu_ref])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(function: SwiGLU, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_matches(function, make_inputs(shape, dtype), dtype)


@pytest.mark.parametrize("function", [swiglu, swiglu_ref])
def test_bf16_is_rounded_once(function: SwiGLU) -> None:
    """The result is the fp32 result, rounded: nothing in between is."""
    x, grad = make_inputs((37, 130), torch.bfloat16)
    for got, exact in zip(run(function, x, grad), run(definition, x.double(), grad.double()), strict=True):
        nearest = exact.to(torch.bfloat16).double()
        bound = (nearest - exact).abs() + 1e-6 * exact.abs().clamp(min=1)
        assert ((got.double() - exact).abs() <= bound).all()


def test_every_gate_is_exact_to_a_few_units() -> None:
    """Over all gates whose sigmoid is a normal number: relative to the element, not to the row."""
    gate = torch.linspace(-87, 88, 1_000_003)
    y = swiglu(torch.cat([gate, torch.ones_like(gate)]))
    want = gate.double() * torch.sigmoid(gate.double())
    assert ((y - want).abs() <= 4e-7 * want.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -1e4, -104, -89, -88.5, -0.0, 0, 88.5, 89, 104, 1e4, 1e30]).to(dtype)
    x, ones = torch.cat([gate, torch.full_like(gate, 2)]), torch.ones_like(gate)
    y, grad = run(swiglu, x, ones)
    want_y, want_grad = run(definition, x.double(), ones)
    torch.testing.assert_close(y.double(), want_y, rtol=TOLERANCE[dtype], atol=1e-35)
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.double(), want_grad, rtol=TOLERANCE[dtype], atol=1e-35)


def test_what_is_no_number_stays_visible() -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, -inf, nan, 1, 1])
    value = torch.tensor([1, 1, 1, nan, inf])
    y = swiglu(torch.cat([gate.repeat_interleave(16), value.repeat_interleave(16)])).view(5, 16)
    want = torch.tensor([inf, nan, nan, nan, inf])  # -inf * 0 is no number
    torch.testing.assert_close(y, want[:, None].expand(5, 16), equal_nan=True)


def strided_views() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Views of a [6, 8, 96] tensor that have a last dimension of 32."""
    return {
        "slice of rows": lambda t: t[..., 32:64],
        "every third element": lambda t: t[..., ::3],
        "transposed leading": lambda t: t.transpose(0, 1)[..., :32],
        "unaligned": lambda t: t.flatten()[1:65].view(2, 32),
        "expanded": lambda t: t[:1, :1, :32].expand(3, 5, 32),
    }


@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_need_not_be_contiguous(view: str, dtype: torch.dtype) -> None:
    x = strided_views()[view](torch.randn(6, 8, 96).to(dtype))
    grad = strided_views()[view](torch.randn(6, 8, 96).to(dtype))
    assert view == "unaligned" or not x.is_contiguous()
    assert_matches(swiglu, [x, grad[..., :16]], dtype)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0), (0,)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    x, grad = make_inputs(shape, torch.float32)
    y, grad_x = run(swiglu, x, grad)
    assert y.shape == grad.shape and grad_x.shape == shape


@pytest.mark.parametrize("shape", [(4, 7), ()])
def test_halves_must_be_equal(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected an even last dimension"):
        swiglu(torch.randn(shape))


def test_gradcheck() -> None:
    x = torch.randn(3, 4, 38, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)


@fused
def test_opcheck() -> None:
    x, grad = make_inputs((4, 7, 24), torch.float32)
    torch.library.opcheck(torch.ops.megamm.swiglu.default, (x.requires_grad_(),))
    torch.library.opcheck(torch.ops.megamm.swiglu_backward.default, (grad, x.detach()))


@fused
def test_the_backward_pass_keeps_x_alone() -> None:
    x, _ = make_inputs((4, 16), torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        swiglu(x.requires_grad_())
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


@fused
def test_bad_arguments_of_the_operator_are_refused() -> None:
    x, grad = make_inputs((4, 8), torch.float32)
    with pytest.raises(RuntimeError, match="expected an even last dimension"):
        torch.ops.megamm.swiglu(x[:, :7])
    with pytest.raises(RuntimeError, match="grad is"):
        torch.ops.megamm.swiglu_backward(grad[:2], x)
    with pytest.raises(RuntimeError, match="grad is Half"):
        torch.ops.megamm.swiglu_backward(grad.half(), x)
    with pytest.raises(RuntimeError, match="no kernel for"):
        torch.ops.megamm.swiglu(x.long())


def test_result_depends_neither_on_the_run_nor_on_the_number_of_threads() -> None:
    inputs = make_inputs((301, 2 * 4099), torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(swiglu, *inputs))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_elements_do_not_depend_on_where_they_stand() -> None:
    """In a full vector or in the remainder, on any tensor-parallel rank: the same bits."""
    x = torch.randn(10, 2 * 77).bfloat16()
    gate, value = x.chunk(2, dim=-1)
    part = torch.cat([gate[:, 70:], value[:, 70:]], dim=-1)
    assert torch.equal(swiglu(x)[:, 70:], swiglu(part))


def test_meta_tensors_have_the_right_shape() -> None:
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = swiglu(x)
    y.backward(torch.empty_like(y))
    assert y.shape == (2, 3, 4) and y.dtype == x.dtype
    assert x.grad is not None and x.grad.shape == x.shape


FALLBACK = """
import importlib.util, sys, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "megamm._C" else find_spec(name, *rest)
from megamm import ops
assert not ops.extension_built(), ops.extension_status()
from megamm.ops.swiglu import swiglu
from tests.ops.norms import assert_kernel_compiles
inputs = torch.load(sys.argv[1])
x = inputs["x"].requires_grad_()
y = swiglu(x)
y.backward(inputs["grad"])
torch.save([y.detach(), x.grad], sys.argv[2])
"""


@fused
def test_fallback_gives_the_same(tmp_path: Path) -> None:
    """A process that finds no extension computes the same numbers."""
    x, grad = make_inputs((33, 50), torch.float32)
    torch.save({"x": x, "grad": grad}, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", FALLBACK, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for got, want in zip(run(swiglu, x, grad), torch.load(tmp_path / "outputs.pt"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.timeout(600)
def test_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    assert_kernel_compiles("swiglu", arch, tmp_path, kernels=12)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (513, 8192), (65, 22016), (3, 140000), (4099, 128), (70000, 16)])
def test_cuda_matches_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    inputs = make_inputs(shape, dtype, "cuda")
    assert_matches(swiglu, inputs, dtype)
    again = [run(swiglu, *inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("view", list(strided_views()))
def test_cuda_inputs_need_not_be_contiguous(view: str) -> None:
    x, grad = (strided_views()[view](torch.randn(6, 8, 96, device="cuda")) for _ in range(2))
    assert_matches(swiglu, [x, grad[..., :16]], torch.float32)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_extreme_gates(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -1e4, -104, -89, 0, 89, 1e4, 1e30], device="cuda").to(dtype)
    x = torch.cat([gate, torch.full_like(gate, 2)])
    y, grad = run(swiglu, x, torch.ones_like(gate))
    want_y, want_grad = run(definition, x.double(), torch.ones_like(gate))
    torch.testing.assert_close(y.double(), want_y, rtol=TOLERANCE[dtype], atol=1e-35)
    torch.testing.assert_close(grad.double(), want_grad, rtol=TOLERANCE[dtype], atol=1e-35)
