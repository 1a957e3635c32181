"""Output layer and cross entropy in chunks: against the two in fp64, memory, and over two processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megamm import ops
from megamm.config import ParallelConfig
from megamm.engine import groups
from megamm.ops import linear_cross_entropy as module
from megamm.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from tests.dist.harness import run_distributed

IGNORED = -100
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def make_inputs(
    rows: int, width: int, columns: int, vocab_size: int, ignored: float, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Hidden states, weight and labels; the weight's padding would win every softmax."""
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(columns, width) * 0.3).to(dtype)
    weight[vocab_size:] *= 100
    labels = torch.randint(0, vocab_size, (rows,))
    labels[torch.rand(rows) < ignored] = IGNORED
    return hidden, weight, labels


def definition(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, size: int) -> torch.Tensor:
    logits = F.linear(hidden.double(), weight.double()[:size]).flatten(0, -2)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(labels.shape)


def run(
    loss: Callable[..., torch.Tensor], inputs: Inputs, grad: torch.Tensor, *args: Any, **more: Any
) -> list[torch.Tensor]:
    """Losses and the gradients of hidden states and weight."""
    hidden, weight = (tensor.detach().requires_grad_() for tensor in inputs[:2])
    losses = loss(hidden, weight, inputs[2], *args, **more)
    return [losses.detach(), *torch.autograd.grad(losses, (hidden, weight), grad.to(losses.dtype))]


def weights_of_rows(rows: int, uniform: bool) -> torch.Tensor:
    return torch.full((rows,), 0.7) if uniform else torch.rand(rows) - 0.3


def chunks_of(rows: int, inputs: Inputs) -> int:
    return rows * inputs[1].shape[0] * inputs[1].element_size()


@pytest.mark.parametrize("rows_per_chunk", [1, 7, 10**6])
@pytest.mark.parametrize("ignored", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_the_definition(
    dtype: torch.dtype, uniform: bool, ignored: float, rows_per_chunk: int
) -> None:
    inputs = make_inputs(23, 16, 103, 100, ignored, dtype)
    grad = weights_of_rows(23, uniform)
    want = run(definition, inputs, grad, 100)
    got = run(linear_cross_entropy, inputs, grad, 100, chunk_bytes=chunks_of(rows_per_chunk, inputs))
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)
    assert (got[2][100:] == 0).all()


def test_reference_is_the_same_function() -> None:
    inputs = make_inputs(23, 16, 103, 100, 0.3)
    grad = weights_of_rows(23, False)
    want = run(linear_cross_entropy_ref, inputs, grad, 100)
    for a, b in zip(run(linear_cross_entropy, inputs, grad, 100), want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_many_chunks_in_bf16_add_up_in_fp32() -> None:
    """The gradient of the weight from 100 chunks is as close to the truth as from one."""
    inputs = make_inputs(800, 32, 64, 64, 0.0, torch.bfloat16)
    grad = torch.ones(800)
    want = run(definition, inputs, grad, 64)[2].double()
    errors = []
    for rows_per_chunk in (800, 8):
        size = chunks_of(rows_per_chunk, inputs)
        got = run(linear_cross_entropy, inputs, grad, 64, chunk_bytes=size)
        assert [t.dtype for t in got] == [torch.float32, torch.bfloat16, torch.bfloat16]
        errors.append((got[2].double() - want).norm() / want.norm())
    assert errors[1] < 1.5 * errors[0] < 0.01


def test_shape_is_that_of_the_labels() -> None:
    """[S, B, H] whose rows are not dense, as a decoder might have them."""
    hidden, weight, labels = make_inputs(24, 16, 40, 40, 0.2)
    hidden = hidden.view(4, 6, 16).transpose(0, 1)
    inputs = (hidden, weight, labels.view(4, 6).t())
    grad = torch.ones(6, 4)
    got, want = (run(loss, inputs, grad, 40) for loss in (linear_cross_entropy, definition))
    assert got[0].shape == (6, 4) and got[1].shape == (6, 4, 16)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-6, atol=2e-6)


class Watcher(TorchDispatchMode):
    """Bytes that tensors other than the given ones hold at a time, at most, and which operators ran."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.peak = self._live = 0
        self.operators: list[str] = []
        self._known = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(func._overloadpacket.__name__)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)

        def freed() -> None:
            self._known.discard(key)
            self._live -= size

        weakref.finalize(storage, freed)


def watch(loss: Callable[..., torch.Tensor], inputs: Inputs, frozen: bool = False, **more: Any) -> Watcher:
    hidden, weight = inputs[0].detach().requires_grad_(), inputs[1].detach().requires_grad_(not frozen)
    with Watcher(*inputs) as watcher:
        loss(hidden, weight, inputs[2], **more).sum().backward()
    return watcher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_rows_never_exist(dtype: torch.dtype) -> None:
    """Memory beyond the inputs: one chunk and the gradients, however many rows there are."""
    rows, width, columns = 2000, 8, 3000
    inputs = make_inputs(rows, width, columns, columns, 0.0, dtype)
    chunk = chunks_of(100, inputs)
    gradients = (rows + columns) * width * inputs[0].element_size()
    wide = columns * width * 6 if dtype == torch.bfloat16 else 0  # the sum in fp32, a product before it
    allowed = chunk + gradients + wide + 32 * rows
    whole = rows * columns * inputs[0].element_size()
    watcher = watch(linear_cross_entropy, inputs, chunk_bytes=chunk)
    assert chunk < watcher.peak <= allowed < 0.12 * whole
    assert watch(linear_cross_entropy_ref, inputs).peak > whole


def test_frozen_weight_costs_nothing() -> None:
    """Neither a product for its gradient nor the check that it can be scaled."""
    inputs = make_inputs(30, 8, 50, 50, 0.0)
    trained, frozen = (
        watch(linear_cross_entropy, inputs, f, chunk_bytes=chunks_of(10, inputs)) for f in (0, 1)
    )
    count = {
        name: sum(op in ("mm", "addmm_") for op in w.operators) for name, w in (("t", trained), ("f", frozen))
    }
    assert count == {"t": 9, "f": 6}
    assert "aminmax" in trained.operators and "aminmax" not in frozen.operators


def test_gradient_of_hidden_states_that_nobody_needs() -> None:
    hidden, weight, labels = make_inputs(30, 8, 50, 50, 0.0)
    with Watcher() as watcher:
        linear_cross_entropy(hidden, weight.requires_grad_(), labels).sum().backward()
    assert watcher.operators.count("mm") == 2 and weight.grad is not None


def test_evaluation_computes_losses_only() -> None:
    inputs = make_inputs(30, 8, 50, 50, 0.3)
    hidden, weight = (t.requires_grad_() for t in inputs[:2])
    with torch.no_grad(), Watcher() as watcher:
        losses = linear_cross_entropy(hidden, weight, inputs[2])
    assert watcher.operators.count("mm") == 1 and not losses.requires_grad
    assert torch.equal(losses, linear_cross_entropy(hidden, weight, inputs[2]))


def test_only_labelled_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = module.losses_of_rows
    monkeypatch.setattr(
        module, "losses_of_rows", lambda logits, *a: (seen.append(len(logits)), real(logits, *a))[1]
    )
    hidden, weight, labels = make_inputs(40, 8, 50, 50, 0.7)
    linear_cross_entropy(hidden, weight, labels)
    assert sum(seen) == (labels != IGNORED).sum() < 40


def test_weight_is_scaled_and_not_recomputed_where_rows_count_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = make_inputs(40, 8, 50, 50, 0.3)
    grad = torch.where(inputs[2] == IGNORED, 5.0, 0.25)  # what rows without a label are given does not matter
    calls = []
    real = module.overwrite_with_gradient
    monkeypatch.setattr(module, "overwrite_with_gradient", lambda *a: (calls.append(1), real(*a))[1])
    run(linear_cross_entropy, inputs, grad)
    assert len(calls) == 1
    run(linear_cross_entropy, inputs, torch.rand(40))
    assert len(calls) == 3


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    hidden, weight, labels = make_inputs(4, 8, 10, 10, 0.0)
    with pytest.raises(ValueError, match=r"weight \[10, 7\]"):
        linear_cross_entropy(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match=r"hidden is torch\.float32, weight torch\.bfloat16"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(IndexError, match="label 9 is not in a vocabulary of 9"):
        linear_cross_entropy(hidden, weight, labels.fill_(9), 9)


def test_meta_tensors_have_the_right_shape() -> None:
    hidden = torch.empty(3, 5, 8, device="meta", requires_grad=True)
    weight = torch.empty(20, 8, device="meta", requires_grad=True)
    losses = linear_cross_entropy(
        hidden, weight, torch.empty(3, 5, device="meta", dtype=torch.long), chunk_bytes=400
    )
    losses.sum().backward()
    assert losses.shape == (3, 5)
    assert hidden.grad is not None and hidden.grad.shape == hidden.shape
    assert weight.grad is not None and weight.grad.shape == weight.shape


def split_inputs(columns: int, vocab_size: int) -> Inputs:
    """The whole vocabulary's, the same on all ranks: [S, B, H] hidden states."""
    torch.manual_seed(5)
    hidden, weight, labels = make_inputs(24, 16, columns, vocab_size, 0.3)
    return hidden.view(12, 2, 16), weight, labels.view(12, 2)


def of_a_rank(columns: int, vocab_size: int, sequence: bool, uniform: bool) -> list[torch.Tensor]:
    """Losses and gradients of what one of the processes has, and how often hidden gradients were summed."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    world = groups.world_size()
    current = groups.initialize(ParallelConfig(tensor=world), torch.device("cpu"), "gloo")
    tp, rank = current.collection.tp, current.tp_rank
    hidden, weight, labels = split_inputs(columns, vocab_size)
    sums = []
    real = dist.all_reduce
    dist.all_reduce = lambda t, *a, **k: (sums.append(t.shape[0]), real(t, *a, **k))[1]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if sequence:
            hidden = gather_from_sequence_parallel_region(hidden, group=tp)
        more = {"group": tp, "sum_hidden_gradient": not sequence, "chunk_bytes": 5 * weight.shape[0] * 4}
        return linear_cross_entropy(hidden, weight, labels, vocab_size, **more)

    own = hidden.chunk(world, 0)[rank] if sequence else hidden
    grad = weights_of_rows(24, uniform).view(12, 2)
    results = run(loss, (own, weight.chunk(world, 0)[rank], labels), grad)
    groups.shutdown()
    return [*results, torch.tensor(sums)]


@pytest.mark.parametrize(
    ("ranks", "columns", "vocab_size", "sequence", "uniform"),
    [
        (1, 50, 47, False, True),
        (2, 50, 50, False, True),
        (2, 50, 47, True, True),
        (2, 8, 3, False, False),
    ],
)
def test_split_vocabulary(ranks: int, columns: int, vocab_size: int, sequence: bool, uniform: bool) -> None:
    """As if it were whole: losses and both gradients, with and without sequence parallelism."""
    arguments = {"columns": columns, "vocab_size": vocab_size, "sequence": sequence, "uniform": uniform}
    results = run_distributed(ranks, "tests.ops.test_linear_cross_entropy:of_a_rank", arguments)
    inputs = split_inputs(columns, vocab_size)
    grad = weights_of_rows(24, uniform).view(12, 2)
    want = [t.double() for t in run(definition, inputs, grad, vocab_size)]
    close: dict[str, Optional[float]] = {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(torch.cat([r[2] for r in results]).double(), want[2], **close)
    if sequence:
        torch.testing.assert_close(torch.cat([r[1] for r in results]).double(), want[1], **close)
    labelled = int((inputs[2] != IGNORED).sum())
    for losses, grad_hidden, _, sums in results:
        assert torch.equal(losses, results[0][0])
        torch.testing.assert_close(losses.double(), want[0], **close)
        assert int(sums.sum()) == (0 if sequence or ranks == 1 else labelled)  # each row once
        if not sequence:
            torch.testing.assert_close(grad_hidden.double(), want[1], **close)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("uniform", [True, False])
def test_cuda_matches_the_definition(dtype: torch.dtype, uniform: bool) -> None:
    inputs: Any = tuple(t.cuda() for t in make_inputs(700, 256, 1003, 1000, 0.2, dtype))
    grad = weights_of_rows(700, uniform).cuda()
    want = run(definition, inputs, grad, 1000)
    got = run(linear_cross_entropy, inputs, grad, 1000, chunk_bytes=chunks_of(128, inputs))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= (
            0.01 if dtype == torch.bfloat16 else 1e-3
        ) * b.double().norm()


@pytest.mark.gpu
@fused
def test_cuda_memory() -> None:
    """16k tokens of a 7B model: the chunk, the gradients and the weight's sum in fp32 (logits: 1 GB)."""
    rows, width, columns = 16384, 4096, 32000
    hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(columns, width, device="cuda", dtype=torch.bfloat16) * 0.02
    labels = torch.randint(0, columns, (rows,), device="cuda")
    for trained, allowed in (
        (False, 2**28 + 2 * rows * width),
        (True, 2**28 + 2 * rows * width + 6 * columns * width),
    ):
        weight.requires_grad_(trained)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        linear_cross_entropy(hidden, weight, labels).sum().backward()
        assert torch.cuda.max_memory_allocated() - before <= allowed + 2**26
        hidden.grad = weight.grad = None
