"""Loss and every gradient of every layout equal those of one process (fp32)."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.dist.harness import run_distributed
from tests.dist.workers import whole_tensors

ASSEMBLIES = ("merged", "cross_attention")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"parallel.tensor": 2}),
    "tp2_sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "dp2": (2, {"parallel.distributed_optimizer": True}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "pp2_vpp2": (2, {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}),
    "tp2_pp2_sp": (4, {"parallel.tensor": 2, "parallel.pipeline": 2, "parallel.sequence": True}),
}
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
    differences = []
    for name, got in whole_tensors(results, "gradients").items():
        want = expected["gradients"][name]
        got = got[: len(want)]  # a layout may pad the vocabulary further
        differences.append((float((got - want).abs().max() / want.abs().max().clamp(min=1e-8)), name))
    return max(differences)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_one_process(layout: str) -> None:
    for assembly, results in run(*LAYOUTS[layout]).items():
        expected = reference()[assembly]
        for result in results:
            assert result["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE)
        names = {name for result in results for name, *_ in result["gradients"]}
        assert names == expected["gradients"].keys()
        difference, name = worst_difference(results, expected)
        assert difference <= TOLERANCE, f"{assembly}: gradient of {name} differs by {difference:.1e}"


@pytest.mark.parametrize("frozen", ["language", "vision"])
def test_frozen_parts_have_no_gradient_and_change_no_other(frozen: str) -> None:
    overrides = {"parallel.tensor": 2, "training.freeze": f"[{frozen}]"}
    for assembly, results in run(2, overrides).items():
        names = {name for result in results for name, *_ in result["gradients"]}
        left_out = reference()[assembly]["gradients"].keys() - names
        assert names and left_out and all(name.startswith(f"{frozen}.") for name in left_out)
        assert not any(name.startswith(f"{frozen}.") and ".gated_" not in name for name in names)
        assert worst_difference(results, reference()[assembly])[0] <= TOLERANCE


def test_indivisible_vocabulary_is_padded_without_changing_the_loss() -> None:
    # 67 tokens: 68 rows on two ranks, the 68th must not take part in the softmax
    result = run(2, {"parallel.tensor": 2}, ("merged",))["merged"][0]
    shapes = {name: shape for name, shape, _, _ in result["gradients"]}
    assert shapes["language.output_layer.weight"][0] == 68
    assert result["loss"] == pytest.approx(reference()["merged"]["loss"], rel=1e-6)


def test_tied_embeddings_across_pipeline_stages() -> None:
    """The first and the last stage each hold the weight, and share its gradient."""
    tied = {"model.language.tie_embeddings": True}
    alone = run(1, tied, ("merged",))["merged"]
    results = run(2, {**tied, "parallel.pipeline": 2}, ("merged",))["merged"]
    expected = {"gradients": whole_tensors(alone, "gradients")}
    assert "language.output_layer.weight" not in expected["gradients"]
    assert results[0]["loss"] == pytest.approx(alone[0]["loss"], rel=TOLERANCE)
    assert worst_difference(results, expected)[0] <= TOLERANCE
