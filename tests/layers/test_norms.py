"""Norms in megatron-core's slot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megamm.layers.norms import LayerNorm, RMSNorm


def config(dtype: torch.dtype = torch.float32, sequence_parallel: bool = False) -> Any:
    return SimpleNamespace(params_dtype=dtype, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_rms_norm_is_torchs(eps: float) -> None:
    norm = RMSNorm(config(), 24, eps=eps)
    assert torch.equal(norm.weight, torch.ones(24))
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, 24, requires_grad=True) * 0.1
    found, wanted = norm(x), F.rms_norm(x, (24,), norm.weight, eps)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(found)
    one, other = (torch.autograd.grad((y * weight).sum(), [x, norm.weight]) for y in (found, wanted))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_class", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("enabled", [True, False])
def test_marks_and_dtype(norm_class: type, enabled: bool) -> None:
    norm = norm_class(config(torch.bfloat16, enabled), 8, eps=1e-3)
    parameters = list(norm.parameters())
    assert parameters and norm.eps == 1e-3
    for parameter in parameters:
        assert parameter.sequence_parallel is enabled and parameter.dtype == torch.bfloat16
    assert norm(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
