"""Parallel linears that are plain where they can be, against megatron-core's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megamm.engine import groups
from megamm.engine.transformer_config import decoder_config
from megamm.layers.linear import ColumnLinear, RowLinear
from tests.dist.harness import run_distributed
from tests.dist.tiny import tiny_recipe

CLASSES = {"column": (ColumnLinear, ColumnParallelLinear), "row": (RowLinear, RowParallelLinear)}


def compare(kind: str, tensor: int, bias: bool, skip_bias_add: bool, trained: bool, grad: bool) -> list[Any]:
    """[output, bias, gradients ...] of ours and theirs, of the same weights."""
    recipe = tiny_recipe("merged", {"parallel.tensor": tensor})
    layout = groups.initialize(recipe.parallel, torch.device("cpu"), "gloo")
    group = layout.collection.tp
    options: dict[str, Any] = dict(
        config=decoder_config(recipe), init_method=torch.nn.init.normal_, bias=bias, tp_group=group
    )
    options |= dict(skip_bias_add=skip_bias_add, is_expert=False)
    options |= {"gather_output": False} if kind == "column" else {"input_is_parallel": True}
    torch.manual_seed(3)  # the same on all ranks, so that they agree on their inputs
    features = 16 if kind == "column" else 16 // tensor
    x0, found = torch.randn(5, 2, features), []
    weights: dict[str, torch.Tensor] = {}
    for linear_class in CLASSES[kind]:
        linear = linear_class(16, 24, **options)
        if not weights:
            weights = {name: torch.randn_like(p) for name, p in linear.named_parameters()}
        for name, parameter in linear.named_parameters():
            parameter.data.copy_(weights[name])
            parameter.requires_grad_(trained)
        x = x0.clone().requires_grad_()
        with torch.set_grad_enabled(grad):
            out, rest = linear(x)
        result = [out.detach(), None if rest is None else rest.detach()]
        if grad:
            out.square().sum().backward()
            result += [x.grad, *[p.grad for p in linear.parameters()]]
        found.append(result)
    groups.shutdown()
    return found


def assert_equal(found: list[Any]) -> None:
    ours, theirs = found
    assert len(ours) == len(theirs) and (ours[0] != 0).any()
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("skip_bias_add", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_one_rank(kind: str, bias: bool, skip_bias_add: bool, trained: bool) -> None:
    for grad in (True, False):
        assert_equal(compare(kind, 1, bias, skip_bias_add, trained, grad))


@pytest.mark.parametrize("kind", CLASSES)
def test_two_ranks(kind: str) -> None:
    for grad in (True, False):
        args = dict(kind=kind, tensor=2, bias=True, skip_bias_add=False, trained=True, grad=grad)
        for found in run_distributed(2, "tests.layers.test_linear:compare", args):
            assert_equal(found)
