"""Vocabulary-parallel cross entropy: the fused operator and its fallback against torch's own, in fp64, and
over two processes against megatron-core's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from megamm import ops
from megamm.config import ParallelConfig
from megamm.engine import groups
from megamm.ops.cross_entropy import cross_entropy, cross_entropy_ref
from tests.dist.harness import run_distributed

ROOT = Path(__file__).resolve().parents[2]
IGNORED = -100
SHAPES = [(1, 1), (7, 3), (5, 33), (130, 257), (3, 2049), (4, 32003), (2, 131072), (600, 8)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
BOTH = [cross_entropy, cross_entropy_ref]
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
Loss = Callable[..., torch.Tensor]


def definition(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: Any) -> torch.Tensor:
    """torch's, in fp64, of the columns that are in the vocabulary."""
    valid = logits.double()[..., :vocab_size].flatten(0, -2)
    return F.cross_entropy(valid, labels.flatten(), reduction="none", ignore_index=IGNORED).view(labels.shape)


def make_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, vocab_size: int, device: str = "cpu"
) -> list[torch.Tensor]:
    """Logits with rows at different heights, labels of which a fifth is ignored, the gradient of the loss."""
    logits = torch.randn(shape) * 4 + torch.randn(shape[:-1])[..., None] * 20
    labels = torch.randint(0, vocab_size, shape[:-1])
    labels[torch.rand(shape[:-1]) < 0.2] = IGNORED
    grad = torch.rand(shape[:-1]) - 0.3
    return [t.to(device) for t in (logits.to(dtype), labels, grad)]


def run(
    loss: Loss, logits: torch.Tensor, labels: torch.Tensor, grad: torch.Tensor, vocab_size: int, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and the gradient of (a copy of) the logits, which keeps their layout."""
    memory = torch.empty_strided(logits.size(), logits.stride(), dtype=logits.dtype, device=logits.device)
    if all(logits.stride()):
        logits = memory.copy_(logits)
    logits = logits.detach().requires_grad_()
    losses = loss(logits, labels, vocab_size=vocab_size, **more)
    return losses.detach(), torch.autograd.grad(losses, logits, grad.to(losses.dtype))[0]


def assert_matches(loss: Loss, inputs: list[torch.Tensor], vocab_size: int, **more: Any) -> None:
    logits, labels, grad = inputs
    want_losses, want = run(definition, logits.double(), labels, grad.double(), vocab_size)
    losses, got = run(loss, *inputs, vocab_size, **more)
    assert losses.dtype == torch.promote_types(logits.dtype, torch.float32) and got.dtype == logits.dtype
    tolerance = TOLERANCE[logits.dtype]
    heights = logits.double().abs().amax(-1).clamp(min=1)
    assert ((losses.double() - want_losses).abs() <= tolerance * heights).all()
    # the gradient is that of fp32, rounded once
    slack = tolerance * grad.double().abs()[..., None] + torch.finfo(logits.dtype).tiny
    rounding = (want.to(logits.dtype).double() - want).abs()
    assert ((got.double() - want).abs() <= rounding + slack).all()
    assert (got[labels == IGNORED] == 0).all() and (got[..., vocab_size:] == 0).all()


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(loss: Loss, dtype: torch.dtype, shape: Any, overwrite: bool) -> None:
    vocab_size = max(1, shape[-1] - 3)
    assert_matches(loss, make_inputs(shape, dtype, vocab_size), vocab_size, overwrite_logits=overwrite)


@pytest.mark.parametrize("loss", BOTH)
def test_all_columns_count_unless_told_otherwise(loss: Loss) -> None:
    logits, labels, _ = make_inputs((3, 4, 50), torch.float32, 50)
    want = definition(logits, labels, 50)
    torch.testing.assert_close(loss(logits, labels).double(), want, rtol=1e-6, atol=1e-5)


def strided_views() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Views of a [6, 8, 96] tensor that have a last dimension of 32."""
    return {
        "slice of rows": lambda t: t[..., 32:64],
        "every third element": lambda t: t[..., ::3],
        "transposed leading": lambda t: t.transpose(0, 1)[..., :32],
        "transposed last": lambda t: t.reshape(18, 8, 32)[0].t()[:32].t(),
        "columns first": lambda t: t.flatten()[:256].view(32, 8).t(),
        "unaligned": lambda t: t.flatten()[1:97].view(3, 32),
        "expanded": lambda t: t[:1, :1, :32].expand(3, 5, 32),
    }


@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_need_not_be_contiguous(view: str, dtype: torch.dtype) -> None:
    logits = strided_views()[view](torch.randn(6, 8, 96).to(dtype))
    _, labels, grad = make_inputs(logits.shape, dtype, 30)
    assert_matches(cross_entropy, [logits, labels, grad], 30)


@pytest.mark.parametrize("loss", BOTH)
def test_gradient_takes_the_place_of_the_logits(loss: Loss) -> None:
    whole = torch.randn(9, 40)
    before = whole.clone()
    logits = whole[:, 8:33].detach().requires_grad_()
    labels = torch.randint(0, 20, (9,))
    (grad,) = torch.autograd.grad(loss(logits, labels, 20).sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert torch.equal(whole[:, :8], before[:, :8]) and torch.equal(whole[:, 33:], before[:, 33:])
    logits = before[:, 8:33].clone().requires_grad_()
    (kept,) = torch.autograd.grad(loss(logits, labels, 20, overwrite_logits=False).sum(), logits)
    assert torch.equal(kept, grad) and torch.equal(logits, before[:, 8:33])


@pytest.mark.parametrize("loss", BOTH)
def test_second_backward_over_overwritten_logits_is_refused(loss: Loss) -> None:
    logits, labels, _ = make_inputs((5, 12), torch.float32, 12)
    losses = loss(logits.requires_grad_() * 1, labels).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()


@pytest.mark.parametrize("loss", BOTH)
def test_rows_without_gradient_are_exactly_zero(loss: Loss) -> None:
    """Also where the logits are not finite: such rows are not read."""
    logits = torch.randn(4, 10)
    logits[1:3] = torch.nan
    labels = torch.tensor([3, IGNORED, 2, 1])
    losses, grad = run(loss, logits, labels, torch.tensor([1.0, 1.0, 0.0, 1.0]), 10)
    assert losses[1] == 0 and torch.isnan(losses[2])
    assert (grad[1:3] == 0).all() and grad.isfinite().all() and (grad[[0, 3]] != 0).all()


@pytest.mark.parametrize("loss", BOTH)
def test_extreme_logits(loss: Loss) -> None:
    inf = torch.inf
    rows = [[1e30, -1e30, 0, 5], [-inf, 2, -inf, 1], [-1e30] * 4, [88, -88, 300, 299.5], [0, 0, 0, -inf]]
    inputs = [torch.tensor(rows), torch.tensor([0, 1, 2, 3, 0]), torch.ones(5)]
    assert_matches(loss, inputs, 4)
    for broken in ([torch.nan, 1.0, 2.0, 3.0], [inf, 1.0, 2.0, 3.0]):
        losses, grad = run(loss, torch.tensor([broken]), torch.tensor([2]), torch.ones(1), 4)
        assert losses.isnan().all() and grad.isnan().any()


@pytest.mark.parametrize("loss", BOTH)
@pytest.mark.parametrize("label", [-1, 30, 32, 10**12])
def test_label_outside_of_the_vocabulary_is_refused(loss: Loss, label: int) -> None:
    with pytest.raises(IndexError, match=rf"label {label} is not in a vocabulary of 30"):
        loss(torch.randn(2, 32), torch.tensor([4, label]), 30)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits are \[4, 8\], labels \[3\]"):
        cross_entropy(torch.randn(4, 8), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    losses, grad = run(
        cross_entropy, torch.zeros(shape), torch.zeros(shape[:-1]).long(), torch.zeros(shape[:-1]), 16
    )
    assert losses.shape == shape[:-1] and grad.shape == shape


def test_gradcheck() -> None:
    logits = torch.randn(3, 2, 19, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[4, IGNORED], [16, 0], [3, 3]])

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, labels, 17, overwrite_logits=False)

    assert torch.autograd.gradcheck(loss, (logits,))


@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    logits, labels, grad = make_inputs((6, 24), dtype, 20)
    where = (0, 20, IGNORED)
    torch.library.opcheck(torch.ops.megamm.cross_entropy_statistics.default, (logits, labels, *where))
    statistics = torch.ops.megamm.cross_entropy_statistics(logits, labels, *where)[:2]
    for gradient in ("cross_entropy_gradient", "cross_entropy_gradient_"):
        operator = getattr(torch.ops.megamm, gradient).default
        torch.library.opcheck(operator, (logits.clone(), labels, statistics, grad, *where))


@fused
def test_bad_arguments_of_the_operators_are_refused() -> None:
    logits, labels, grad = make_inputs((4, 8), torch.float32, 8)
    where = (0, 8, IGNORED)
    statistics = torch.ops.megamm.cross_entropy_statistics(logits, labels, *where)
    with pytest.raises(RuntimeError, match="labels are"):
        torch.ops.megamm.cross_entropy_statistics(logits, labels[:2], *where)
    with pytest.raises(RuntimeError, match="expected int64"):
        torch.ops.megamm.cross_entropy_statistics(logits, labels.int(), *where)
    with pytest.raises(RuntimeError, match="not maximum and sum"):
        torch.ops.megamm.cross_entropy_gradient(logits, labels, statistics, grad, *where)
    with pytest.raises(RuntimeError, match="not one Float for each row"):
        torch.ops.megamm.cross_entropy_gradient(logits, labels, statistics[:2], grad.double(), *where)
    with pytest.raises(RuntimeError, match="cannot hold the gradient"):
        overlapping = logits[:1].expand(4, 8)
        torch.ops.megamm.cross_entropy_gradient_(overlapping, labels, statistics[:2], grad, *where)


@fused
def test_result_does_not_depend_on_the_number_of_threads() -> None:
    inputs = make_inputs((300, 1025), torch.float32, 1025)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(cross_entropy, *inputs, 1025))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_meta_tensors_have_the_right_shape() -> None:
    logits = torch.empty(2, 3, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    losses = cross_entropy(logits * 1, torch.empty(2, 3, device="meta", dtype=torch.long))
    losses.sum().backward()
    assert losses.shape == (2, 3) and losses.dtype == torch.float32
    assert logits.grad is not None and logits.grad.shape == logits.shape


FALLBACK = """
import importlib.util, sys, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "megamm._C" else find_spec(name, *rest)
from megamm import ops
assert not ops.extension_built(), ops.extension_status()
from megamm.ops.cross_entropy import cross_entropy
logits, labels, grad = torch.load(sys.argv[1])
losses = cross_entropy(logits.requires_grad_(), labels, 45)
torch.save([losses.detach(), torch.autograd.grad(losses, logits, grad)[0]], sys.argv[2])
"""


@fused
def test_fallback_gives_the_same(tmp_path: Path) -> None:
    """A process that finds no extension computes the same numbers."""
    inputs = make_inputs((33, 50), torch.float32, 45)
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", FALLBACK, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for got, want in zip(run(cross_entropy, *inputs, 45), torch.load(tmp_path / "outputs.pt"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5)


def split_inputs(columns: int, vocab_size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The whole vocabulary's, the same on all ranks; padding columns hold what would win."""
    torch.manual_seed(5)
    logits, labels, grad = make_inputs((24, columns), dtype, vocab_size)
    logits[:, vocab_size:] = 1e4
    return [logits, labels, grad]


def of_a_rank(columns: int, vocab_size: int, dtype: str, reference: bool) -> dict[str, Any]:
    """What one of the processes gets for its part; with megatron's numbers where there is no padding."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    world = groups.world_size()
    current = groups.initialize(ParallelConfig(tensor=world), torch.device("cpu"), "gloo")
    logits, labels, grad = split_inputs(columns, vocab_size, getattr(torch, dtype))
    own = logits.chunk(world, 1)[current.tp_rank]
    sent: list[str] = []
    for name in ("all_reduce", "all_gather_into_tensor"):
        collective = getattr(dist, name)
        setattr(dist, name, lambda *a, name=name, real=collective, **k: (sent.append(name), real(*a, **k))[1])
    loss = cross_entropy_ref if reference else cross_entropy
    losses, own_grad = run(loss, own, labels, grad, vocab_size, group=current.collection.tp)
    result = {"losses": losses, "grad": own_grad, "sent": list(sent)}
    if columns == vocab_size:
        own = own.detach().clone().requires_grad_()
        megatron = vocab_parallel_cross_entropy(own[:, None], labels.clamp(min=0)[:, None])[:, 0]
        grad = grad.masked_fill(labels == IGNORED, 0)
        result["megatron"] = [megatron.detach(), torch.autograd.grad(megatron, own, grad)[0]]
    groups.shutdown()
    return result


@pytest.mark.parametrize(
    ("ranks", "columns", "vocab_size", "reference"),
    [(1, 48, 48, False), (2, 130, 130, False), (2, 130, 127, False), (2, 8, 3, False), (2, 8, 3, True)],
)
def test_split_vocabulary(ranks: int, columns: int, vocab_size: int, reference: bool) -> None:
    """As if it were whole, also where one process holds nothing but padding; and as megatron-core has it."""
    arguments = {"columns": columns, "vocab_size": vocab_size, "dtype": "float32", "reference": reference}
    results = run_distributed(ranks, "tests.ops.test_cross_entropy:of_a_rank", arguments)
    logits, labels, grad = split_inputs(columns, vocab_size, torch.float32)
    want_losses, want = run(definition, logits.double(), labels, grad.double(), vocab_size)
    got = torch.cat([result["grad"] for result in results], 1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    for result in results:
        assert result["sent"] == ["all_gather_into_tensor"] * (ranks > 1)
        assert torch.equal(result["losses"], results[0]["losses"])
        torch.testing.assert_close(result["losses"].double(), want_losses, rtol=1e-6, atol=1e-5)
        if columns == vocab_size:
            losses, own_grad = result["megatron"]
            kept = labels != IGNORED
            torch.testing.assert_close(result["losses"][kept], losses[kept], rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(result["grad"], own_grad, rtol=0, atol=1e-6)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.timeout(600)
def test_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    """With plain nvcc and no torch header; warnings are errors; all variables stay in registers."""
    target = tmp_path / f"cross_entropy_{arch}.o"
    command = ["nvcc", "-c", "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "csrc/cross_entropy/kernel.cu"]
    done = subprocess.run([*command, "-o", target], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert len(spills) == 2 * 6 and set(spills) == {"0"}, done.stderr


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (4099, 4096), (513, 32000), (515, 32003)])
def test_cuda_matches_the_definition(dtype: torch.dtype, shape: Any, overwrite: bool) -> None:
    vocab_size = max(1, shape[-1] - 3)
    inputs = make_inputs(shape, dtype, vocab_size, "cuda")
    assert_matches(cross_entropy, inputs, vocab_size, overwrite_logits=overwrite)
    again = [run(cross_entropy, *inputs, vocab_size) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("view", list(strided_views()))
def test_cuda_logits_need_not_be_contiguous(view: str) -> None:
    logits = strided_views()[view](torch.randn(6, 8, 96, device="cuda"))
    _, labels, grad = make_inputs(logits.shape, torch.float32, 30, "cuda")
    assert_matches(cross_entropy, [logits, labels, grad], 30)


@pytest.mark.gpu
@fused
def test_cuda_marks_what_is_wrong_with_nan() -> None:
    logits = torch.randn(3, 32, device="cuda")
    logits[2, 5] = torch.nan
    losses = cross_entropy(logits, torch.tensor([30, 1, 2], device="cuda"), 30)
    assert losses.isnan().tolist() == [True, False, True]
