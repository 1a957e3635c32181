"""Layouts and the vocabulary: padding it and sharing it between stages. (All else: test_layout_table.py.)"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tests.dist.harness import run_distributed
from tests.dist.tiny import KINDS
from tests.dist.workers import whole_tensors

ASSEMBLIES = tuple(KINDS)
TOLERANCE = 1e-5  # of the largest element of a tensor


Results = list[dict[str, Any]]  # of each rank


def run(
    world_size: int,
    overrides: dict[str, Any],
    assemblies: tuple[str, ...] = ASSEMBLIES,
    sabotage: str | None = None,
) -> dict[str, Results]:
    """One step of each assembly in a layout: by assembly, the results of the ranks."""
    args = {"assemblies": assemblies, "overrides": overrides, "sabotage": sabotage}
    ranks = run_distributed(world_size, "tests.dist.workers:one_step_each", args)
    return {assembly: [rank[assembly] for rank in ranks] for assembly in assemblies}


@functools.cache
def reference() -> dict[str, dict[str, Any]]:
    """Loss, gradient norm and whole gradients of one process, by assembly."""
    return {
        assembly: {**results[0], "gradients": whole_tensors(results, "gradients")}
        for assembly, results in run(1, {}).items()
    }


def worst_difference(results: Results, expected: dict[str, Any]) -> tuple[float, str]:
    """Largest difference of a gradient relative to its largest element, and whose it is."""
    gates = max((scale(want) for name, want in expected["gradients"].items() if is_gate(name)), default=0.0)
    differences = []
    for name, got in whole_tensors(results, "gradients").items():
        want = expected["gradients"][name]
        if name.endswith("k_layernorm.bias"):
            # what is added to all keys of a head changes no softmax: zero, but for rounding
            assert max(scale(got), scale(want)) < 1e-7, name
            continue
        got = got[: len(want)]  # a layout may pad the vocabulary further
        # a gate is one number, whose gradient is a sum that may cancel: it counts against the largest gate's
        largest = gates if is_gate(name) else max(scale(want), 1e-8)
        differences.append((scale(got - want) / largest, name))
    return max(differences)


def scale(x: torch.Tensor) -> float:
    return float(x.abs().max())


def is_gate(name: str) -> bool:
    return name.endswith("_gate")


def test_indivisible_vocabulary_is_padded_without_changing_the_loss() -> None:
    # 67 tokens: 68 rows on two ranks, the 68th must not take part in the softmax
    result = run(2, {"parallel.tensor": 2}, ("merged",))["merged"][0]
    shapes = {name: shape for name, shape, _, _ in result["gradients"]}
    assert shapes["language.output_layer.weight"][0] == 68
    assert result["loss"] == pytest.approx(reference()["merged"]["loss"], rel=1e-6)


def test_a_real_vocabulary_that_four_ranks_cannot_share() -> None:
    vocabulary = {"model.language.vocab_size": 32002, "model.language.num_kv_heads": 4}
    alone = run(1, vocabulary, ("merged",))["merged"][0]
    results = run(4, {**vocabulary, "parallel.tensor": 4}, ("merged",))
    shapes = {name: shape for name, shape, _, _ in results["merged"][0]["gradients"]}
    assert shapes["language.output_layer.weight"][0] == 32004
    assert results["merged"][0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_tied_embeddings_across_pipeline_stages() -> None:
    """The first and the last stage each hold the weight, and share its gradient."""
    tied = {"model.language.tie_embeddings": True}
    alone = run(1, tied, ("merged",))["merged"]
    results = run(2, {**tied, "parallel.pipeline": 2}, ("merged",))["merged"]
    expected = {"gradients": whole_tensors(alone, "gradients")}
    assert "language.output_layer.weight" not in expected["gradients"]
    assert results[0]["loss"] == pytest.approx(alone[0]["loss"], rel=TOLERANCE)
    assert worst_difference(results, expected)[0] <= TOLERANCE
