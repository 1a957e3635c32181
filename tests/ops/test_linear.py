"""Products and attention of bf16 by way of fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megamm.ops import attention as attention_op
from megamm.ops import linear as linear_op
from megamm.ops.attention import attention
from megamm.ops.linear import fp32_is_faster, linear

BF16 = torch.bfloat16


@pytest.fixture(params=[True, False], ids=["by fp32", "as it is"])
def by_fp32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    for module in (linear_op, attention_op):
        monkeypatch.setattr(module, "fp32_is_faster", lambda: request.param)
    return bool(request.param)


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, generator=generator).to(out.dtype)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, weight))
    return [next(found) if x.requires_grad else None for x in inputs]


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within two roundings of bf16 of the largest element."""
    assert found.dtype == BF16
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    assert error < 2 * 2**-8, error


def kinds(out: torch.Tensor) -> str:
    assert out.grad_fn is not None
    return type(out.grad_fn).__name__


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [(5, 20), (3,), (64,)])
def test_linear(bias: bool, trained: bool, rows: tuple[int, ...], by_fp32: bool) -> None:
    x = torch.randn(*rows, 24).to(BF16).requires_grad_()
    weight = torch.randn(40, 24).to(BF16).requires_grad_(trained)
    b = torch.randn(40).to(BF16).requires_grad_(trained) if bias else None
    inputs = [t for t in (x, weight, b) if t is not None]
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    found, wanted = linear(x, weight, b), F.linear(*exact)
    assert ("InFloat" in kinds(found)) == (by_fp32 and x.numel() >= 32 * 24)
    assert_near(found, wanted)
    for one, other in zip(gradients(found, inputs), gradients(wanted, exact), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert_near(one, other)


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 64, 65])
@pytest.mark.parametrize("features", [40, 2500])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_few_rows(rows: int, features: int, bias: bool) -> None:
    x, weight = torch.randn(1, rows, 24), torch.randn(features, 24)
    b = torch.randn(features) if bias else None
    found = linear(x, weight, b)
    assert found.shape == (1, rows, features) and found.is_contiguous()
    torch.testing.assert_close(found, F.linear(x, weight, b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(is_causal: bool, scale: float | None, by_fp32: bool) -> None:
    inputs = [torch.randn(2, 40, 3, 16).to(BF16).transpose(1, 2).requires_grad_() for _ in range(3)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    found = attention(*inputs, is_causal=is_causal, scale=scale)
    wanted = F.scaled_dot_product_attention(*exact, is_causal=is_causal, scale=scale)
    assert ("InFloat" in kinds(found)) == by_fp32
    assert_near(found, wanted)
    for one, other in zip(gradients(found, inputs), gradients(wanted, exact), strict=True):
        assert one is not None and other is not None
        assert_near(one, other)


@pytest.mark.parametrize("what", ["groups", "mask", "one query", "fp32"])
def test_other_attention_is_torchs(what: str, by_fp32: bool) -> None:
    heads = 2 if what == "groups" else 4
    dtype = torch.float32 if what == "fp32" else BF16
    q = torch.randn(1, 4, 1 if what == "one query" else 40, 16).to(dtype).requires_grad_()
    k, v = (torch.randn(1, heads, 40, 16).to(dtype) for _ in range(2))
    mask = torch.rand(40, 40) > 0.3 if what == "mask" else None
    found = attention(q, k, v, mask)
    assert "InFloat" not in kinds(found)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads == 2)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    "vendor, flags, wanted",
    [
        ("GenuineIntel", "avx2 avx512f", True),
        ("GenuineIntel", "avx512f avx512_bf16", True),
        ("GenuineIntel", "avx512_bf16 amx_bf16", False),
        ("AuthenticAMD", "avx2", True),
        ("AuthenticAMD", "avx512f avx512_bf16", False),
    ],
)
def test_which_processors(vendor: str, flags: str, wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    fp32_is_faster.cache_clear()
    try:
        assert fp32_is_faster() is wanted
    finally:
        fp32_is_faster.cache_clear()


@pytest.mark.parametrize("text", ["", "processor\t: 0\nFeatures\t: fp asimd bf16\n", None])
def test_unknown_processors(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> str:
        if text is None:
            raise OSError
        return str(text)

    monkeypatch.setattr(Path, "read_text", read)
    fp32_is_faster.cache_clear()
    try:
        assert fp32_is_faster() is False
    finally:
        fp32_is_faster.cache_clear()
