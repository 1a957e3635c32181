"""Rotary positions: the fused operators and their fallbacks against the definition, computed in fp64."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import pytest
import torch

from megamm import ops
from megamm.ops.rope import rope, rope_qkv, rope_qkv_ref, rope_ref, rope_table
from tests.ops.norms import assert_kernel_compiles

ROOT = Path(__file__).resolve().parents[2]
# Largest error, relative to the largest element of the head (absolute below 1: gradients cancel).
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
Rope = Callable[..., tuple[torch.Tensor, ...]]
# leading shape, query heads, key heads, D, R
SHAPES = [
    ((5, 2), 4, 2, 8, 8),
    ((1, 1), 1, 1, 2, 2),
    ((33, 3), 6, 3, 10, 6),
    ((70,), 4, 1, 128, 128),
    ((9, 1), 2, 2, 80, 80),
    ((7, 2), 3, 3, 67, 34),
    ((4, 1), 2, 1, 64, 0),
    ((40, 2), 8, 8, 64, 32),
    ((2, 1), 2, 1, 4100, 4098),
]


def angles(rows: int, rotary_dim: int) -> torch.Tensor:
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2) / max(rotary_dim, 1))
    return torch.outer(torch.arange(rows).float(), frequencies)


def definition(x: torch.Tensor, table: torch.Tensor, positions: Optional[torch.Tensor]) -> torch.Tensor:
    """Equation 13 of arXiv:2104.09864 in complex numbers, in fp64."""
    half = table.shape[1] // 2
    turn = torch.complex(table[:, :half].double(), table[:, half:].double())
    turn = turn[: len(x)] if positions is None else turn[positions]
    turn = turn.view(*turn.shape[:-1], *[1] * (x.dim() - turn.dim()), half)
    x = x.double()
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn
    return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


def both_by_definition(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, ...]:
    return definition(q, table, positions), definition(k, table, positions)


def run(
    function: Rope, inputs: list[torch.Tensor], grads: list[torch.Tensor], *rest: object
) -> list[torch.Tensor]:
    """What the function returns, and the gradients of its inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs, *rest)
    grads = [grad.to(out.dtype) for grad, out in zip(grads, outputs, strict=True)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, inputs, grads)]


def assert_close(got: list[torch.Tensor], want: list[torch.Tensor], dtype: torch.dtype) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == dtype, i
        if b.numel():
            error = (a.double() - b.double()).abs().amax(-1) / b.double().abs().amax(-1).clamp(min=1)
            assert error.max() <= TOLERANCE[dtype], f"{i}: {error.max():.2e}"


def make_heads(leading: tuple[int, ...], q: int, k: int, d: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [(3 * torch.randn(*leading, heads, d)).to(dtype) for heads in (q, k)]


def make_positions(leading: tuple[int, ...], kind: str, rows: int) -> Optional[torch.Tensor]:
    if kind == "none":
        return None
    if kind == "per position":
        return torch.randint(rows, leading[:1])
    # as a batch has them: [B, S], turned around
    return torch.randint(rows, leading[::-1]).movedim(-1, 0)


@pytest.mark.parametrize("function", [rope, rope_ref])
@pytest.mark.parametrize("kind", ["none", "per position", "per token"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(
    function: Rope, dtype: torch.dtype, shape: tuple[tuple[int, ...], int, int, int, int], kind: str
) -> None:
    leading, q, k, d, r = shape
    table = rope_table(angles(100, r))
    positions = make_positions(leading, kind, 100)
    inputs, grads = make_heads(leading, q, k, d, dtype), make_heads(leading, q, k, d, dtype)
    got = run(function, inputs, grads, table, positions)
    exact = [tensor.double() for tensor in inputs], [grad.double() for grad in grads]
    assert_close(got, run(both_by_definition, *exact, table, positions), dtype)


@pytest.mark.parametrize("function", [rope_qkv, rope_qkv_ref])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("leading", "groups", "per_group", "d", "r"),
    [((5, 2), 2, 3, 8, 8), ((6, 1), 4, 1, 128, 128), ((33,), 3, 2, 10, 6), ((8, 2), 1, 4, 64, 0)],
)
def test_split_heads_match_the_definition(
    function: Rope, dtype: torch.dtype, leading: tuple[int, ...], groups: int, per_group: int, d: int, r: int
) -> None:
    table = rope_table(angles(50, r))
    positions = torch.randint(50, leading)
    qkv = torch.randn(*leading, groups, (per_group + 2) * d).to(dtype)
    heads = (groups * per_group, groups, groups)
    grads = [torch.randn(*leading, n, d).to(dtype) for n in heads]

    def by_definition(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = qkv.view(*leading, groups, per_group + 2, d)
        q, k, v = parts[..., :-2, :].flatten(-3, -2), parts[..., -2, :], parts[..., -1, :]
        return *both_by_definition(q, k, table, positions), v

    got = run(function, [qkv], grads, d, table, positions)
    assert_close(got, run(by_definition, [qkv.double()], [grad.double() for grad in grads]), dtype)
    assert torch.equal(got[2], by_definition(qkv)[2]), "values are copied, bit by bit"


@pytest.mark.parametrize("function", [rope, rope_ref])
def test_bf16_is_rounded_once(function: Rope) -> None:
    """The result is the fp32 result, rounded: nothing in between is."""
    q, k = make_heads((37, 2), 4, 2, 32, torch.bfloat16)
    table = rope_table(angles(37, 32))
    for got, x in zip(function(q, k, table), (q, k), strict=True):
        exact = definition(x, table, None)
        nearest = exact.to(torch.bfloat16).double()
        assert ((got.double() - exact).abs() <= (nearest - exact).abs() + 1e-6 * exact.abs().max()).all()


def strided_views() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """[6, 2, 3, 16] out of a [6, 2, 3, 48] tensor."""
    return {
        "part of a head": lambda t: t[..., 16:32],
        "every third element": lambda t: t[..., ::3],
        "batch first": lambda t: t.flatten()[: 6 * 2 * 48].view(2, 6, 3, 16).transpose(0, 1),
        "heads before positions": lambda t: t.flatten()[: 6 * 2 * 48].view(2, 3, 6, 16).permute(2, 0, 1, 3),
        "unaligned": lambda t: t.flatten()[1 : 1 + 6 * 2 * 48].view(6, 2, 3, 16),
        "expanded": lambda t: t[:1, :, :1, :16].expand(6, 2, 3, 16),
    }


@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_need_not_be_contiguous(view: str, dtype: torch.dtype) -> None:
    table, positions = rope_table(angles(12, 16))[::2], torch.tensor([0, 1, 2, 0, 1, 0])
    q, k, grad_q, grad_k = (strided_views()[view](torch.randn(6, 2, 3, 48).to(dtype)) for _ in range(4))
    k, grad_k = k[:, :, 1:], grad_k[:, :, 1:]
    got = run(rope, [q, k], [grad_q, grad_k], table, positions)
    exact = [q.double(), k.double()], [grad_q.double(), grad_k.double()]
    assert_close(got, run(both_by_definition, *exact, table, positions), dtype)
    # the backward pass of the fused split reads gradients of any strides, and writes the groups
    qkv = torch.randn(6, 2, 2, 5 * 16).to(dtype)[:, :, :1]
    got = run(rope_qkv, [qkv], [grad_q, grad_k[:, :, :1], grad_k[:, :, :1]], 16, table, positions)
    want = run(rope_qkv_ref, [qkv], [grad_q, grad_k[:, :, :1], grad_k[:, :, :1]], 16, table, positions)
    assert_close(got, want, dtype)


def test_agrees_with_megatron() -> None:
    """On what megatron's attention has at hand: its angles, and the split output of its projection."""
    from megamm.engine import cpu

    cpu.install_if_needed()
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    s, b, groups, per_group, d = 24, 2, 2, 3, 32
    rotary = angles(s, d).repeat(1, 2)[:, None, None]
    table = rope_table(rotary[:, 0, 0, : d // 2])
    qkv = torch.randn(s, b, groups, (per_group + 2) * d)
    q, k, v = qkv.split([per_group * d, d, d], dim=3)
    q = q.reshape(s, b, -1, d)
    want = [_apply_rotary_pos_emb_bshd(x, rotary) for x in (q, k)]
    torch.testing.assert_close(rope(q, k, table), tuple(want), rtol=0, atol=1e-6)
    torch.testing.assert_close(rope_qkv(qkv, d, table), (*want, v), rtol=0, atol=1e-6)


def test_documents_of_a_packed_row_do_not_know_of_each_other() -> None:
    q, k = make_heads((12, 1), 4, 2, 16, torch.bfloat16)
    table, lengths = rope_table(angles(12, 16)), [5, 4, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])
    whole = rope(q, k, table, positions)
    for x, packed in zip((q, k), whole, strict=True):
        alone = [rope(part, part, table)[0] for part in x.split(lengths)]
        assert torch.equal(packed, torch.cat(alone))


@pytest.mark.parametrize(
    "shape", [((0, 2), 4, 2, 8), ((3, 0), 4, 2, 8), ((3, 2), 4, 0, 8), ((3, 2), 0, 0, 8)]
)
def test_empty_input(shape: tuple[tuple[int, ...], int, int, int]) -> None:
    inputs, grads = make_heads(*shape, torch.float32), make_heads(*shape, torch.float32)
    table = rope_table(angles(4, 8))
    for positions in (None, torch.zeros(shape[0], dtype=torch.long)):
        got = run(rope, inputs, grads, table, positions)
        assert_close(got, run(rope_ref, inputs, grads, table, positions), torch.float32)


def test_no_tokens_to_split() -> None:
    qkv, grads = torch.randn(0, 2, 2, 4 * 8), [torch.randn(0, 2, n, 8) for n in (4, 2, 2)]
    assert run(rope_qkv, [qkv], grads, 8, rope_table(angles(4, 8)))[3].shape == qkv.shape


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    q, k = make_heads((6, 2), 4, 2, 8, torch.float32)
    table = rope_table(angles(6, 8))
    with pytest.raises(ValueError, match="the same"):
        rope(q, k[:5], table)
    with pytest.raises(ValueError, match="an even number up to 8"):
        rope(q, k, torch.randn(6, 10))
    with pytest.raises(ValueError, match="5 rows for a sequence of 6"):
        rope(q, k, table[:5])
    with pytest.raises(ValueError, match=r"positions are \[2, 6\]"):
        rope(q, k, table, torch.zeros(2, 6, dtype=torch.long))
    for qkv in (q, torch.randn(6, 2, 0, 24)):  # not a whole number of heads, no groups
        with pytest.raises(ValueError, match=r"expected \[..., groups"):
            rope_qkv(qkv, 3, table)


@pytest.mark.parametrize("function", [rope, rope_ref])
@pytest.mark.parametrize("position", [-1, 6])
def test_position_outside_the_table_is_refused(function: Rope, position: int) -> None:
    q, k = make_heads((6, 2), 4, 2, 8, torch.float32)
    with pytest.raises(IndexError, match="out of range"):
        function(q, k, rope_table(angles(6, 8)), torch.tensor([0, 1, 2, 3, 4, position]))


def test_gradcheck() -> None:
    table, positions = rope_table(angles(9, 6)), torch.tensor([[8, 0], [3, 3], [1, 2]])
    q, k = (x.requires_grad_() for x in make_heads((3, 2), 4, 2, 7, torch.float64))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, table, positions), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, table, positions), (q, k))
    qkv = torch.randn(3, 2, 2, 4 * 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda qkv: rope_qkv(qkv, 7, table, positions), (qkv,))


@fused
@pytest.mark.parametrize("positions", [None, torch.tensor([3, 0, 1, 2])])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_opcheck(trained: tuple[bool, bool], positions: Optional[torch.Tensor]) -> None:
    q, k = (
        x.requires_grad_(t) for x, t in zip(make_heads((4, 2), 4, 2, 8, torch.float32), trained, strict=True)
    )
    table = rope_table(angles(4, 8))
    torch.library.opcheck(torch.ops.megamm.rope.default, (q, k, table, positions, False))
    qkv = torch.randn(4, 2, 2, 4 * 8, requires_grad=True)
    torch.library.opcheck(torch.ops.megamm.rope_qkv.default, (qkv, 8, table, positions))
    grads = [torch.randn(4, 2, heads, 8) for heads in (4, 2, 2)]
    torch.library.opcheck(torch.ops.megamm.rope_qkv_backward.default, (*grads, table, positions))


@fused
def test_gradients_that_nobody_needs_are_not_computed() -> None:
    """A frozen key must not cost its gradient."""
    q, k = make_heads((6, 2), 4, 2, 8, torch.float32)
    table = rope_table(angles(6, 8))
    want = run(rope, [q, k], [q, k], table)
    for trained in (0, 1):
        inputs = [q.clone(), k.clone()]
        inputs[trained].requires_grad_()
        outputs = rope(*inputs, table)
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            torch.autograd.backward(outputs[trained], (q, k)[trained])
        shapes = [event.input_shapes for event in profile.function_events if event.name == "megamm::rope"]
        assert len(shapes) == 1 and shapes[0][1 - trained][2] == 0
        assert torch.equal(inputs[trained].grad, want[2 + trained]) and inputs[1 - trained].grad is None


@fused
def test_bad_arguments_of_the_operators_are_refused() -> None:
    q, k = make_heads((6, 2), 4, 2, 8, torch.float32)
    table = rope_table(angles(6, 8))
    call = torch.ops.megamm.rope
    for message, args in {
        "may differ in their heads only": (q, k[:3], table, None, False),
        "q is Float": (q, k.half(), table, None, False),
        "table is Double": (q, k, table.double(), None, False),
        "an even number up to 8": (q, k, table[:, :3], None, False),
        "5 rows for a sequence of 6": (q, k, table[:5], None, False),
        "positions are Int": (q, k, table, torch.zeros(6, dtype=torch.int), False),
        "positions are \\[3\\]": (q, k, table, torch.zeros(3, dtype=torch.long), False),
        "expected \\[tokens, heads, d\\]": (q[0, 0], k[0, 0], table, None, False),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(*args)
    with pytest.raises(RuntimeError, match="groups"):
        torch.ops.megamm.rope_qkv(q, 5, table, None)
    with pytest.raises(RuntimeError, match="3 queries for 2 keys"):
        torch.ops.megamm.rope_qkv_backward(q[:, :, :3], k, k, table, None)


def test_result_depends_neither_on_the_run_nor_on_the_number_of_threads() -> None:
    inputs = make_heads((999, 2), 5, 2, 24, torch.float32)
    table, threads = rope_table(angles(999, 24)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(rope, inputs, inputs, table))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_meta_tensors_have_the_right_shape() -> None:
    table, positions = torch.empty(6, 8, device="meta"), torch.empty(6, device="meta", dtype=torch.long)
    qkv = torch.empty(6, 2, 3, 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = rope_qkv(qkv, 8, table, positions)
    assert q.shape == (6, 2, 6, 8) and k.shape == v.shape == (6, 2, 3, 8)
    turned_q, turned_k = rope(q, k, table, positions)
    torch.autograd.backward([turned_q, turned_k, v], [torch.empty_like(x) for x in (q, k, v)])
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape and qkv.grad.dtype == qkv.dtype


FALLBACK = """
import importlib.util, sys, torch
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "megamm._C" else find_spec(name, *rest)
from megamm import ops
assert not ops.extension_built(), ops.extension_status()
from megamm.ops.rope import rope, rope_qkv
from tests.ops.norms import assert_kernel_compiles
inputs = torch.load(sys.argv[1])
qkv = inputs["qkv"].requires_grad_()
q, k, v = rope_qkv(qkv, 8, inputs["table"])
q, k = rope(q, k, inputs["table"], inputs["positions"])
(q.square().sum() + k.exp().sum() + v.sum()).backward()
torch.save([q.detach(), k.detach(), v.detach(), qkv.grad], sys.argv[2])
"""


@fused
def test_fallback_gives_the_same(tmp_path: Path) -> None:
    """A process that finds no extension computes the same numbers."""
    inputs = {
        "qkv": torch.randn(6, 2, 2, 32),
        "table": rope_table(angles(6, 8)),
        "positions": torch.arange(6),
    }
    torch.save(inputs, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", FALLBACK, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    qkv = inputs["qkv"].requires_grad_()
    q, k, v = rope_qkv(qkv, 8, inputs["table"])
    q, k = rope(q, k, inputs["table"], inputs["positions"])
    (q.square().sum() + k.exp().sum() + v.sum()).backward()
    for got, want in zip((q, k, v, qkv.grad), torch.load(tmp_path / "outputs.pt"), strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-5)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.timeout(600)
def test_cuda_kernel_compiles(arch: str, tmp_path: Path) -> None:
    assert_kernel_compiles("rope", arch, tmp_path, kernels=6)


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, ((513, 3), 32, 8, 128, 128), ((2, 70000), 1, 1, 8, 8)], ids=str)
def test_cuda_matches_the_definition(
    dtype: torch.dtype, shape: tuple[tuple[int, ...], int, int, int, int]
) -> None:
    leading, q, k, d, r = shape
    table, positions = rope_table(angles(100, r)).cuda(), torch.randint(100, leading).cuda()
    inputs, grads = ([x.cuda() for x in make_heads(leading, q, k, d, dtype)] for _ in range(2))
    exact = [tensor.double() for tensor in inputs], [grad.double() for grad in grads]
    want = run(both_by_definition, *exact, table, positions)
    again = [run(rope, inputs, grads, table, positions) for _ in range(2)]
    assert_close(again[0], want, dtype)
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))


@pytest.mark.gpu
@fused
@pytest.mark.parametrize("view", list(strided_views()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_inputs_need_not_be_contiguous(view: str, dtype: torch.dtype) -> None:
    table, positions = rope_table(angles(12, 16)).cuda()[::2], torch.tensor([0, 1, 2, 0, 1, 0]).cuda()
    source = torch.randn(4, 6, 2, 3, 48, device="cuda").to(dtype)
    q, k, grad_q, grad_k = (strided_views()[view](t) for t in source)
    got = run(rope, [q, k], [grad_q, grad_k], table, positions)
    exact = [q.double(), k.double()], [grad_q.double(), grad_k.double()]
    assert_close(got, run(both_by_definition, *exact, table, positions), dtype)
    qkv = torch.randn(6, 2, 2, 5 * 16, device="cuda").to(dtype)[:, :, :1]
    grads = [grad_q, grad_k[:, :, :1], grad_k[:, :, :1]]
    rest = (16, table, positions)
    assert_close(run(rope_qkv, [qkv], grads, *rest), run(rope_qkv_ref, [qkv], grads, *rest), dtype)
