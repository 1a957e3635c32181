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


def run(world_size: int, assembly: str, overrides: dict[str, Any], sabotage: str | None = None) -> list[Any]:
    args = {"assembly": assembly, "overrides": overrides, "sabotage": sabotage}
    return run_distributed(world_size, "tests.dist.workers:one_step", args)


@functools.cache
def reference(assembly: str) -> dict[str, Any]:
    result = run(1, assembly, {})
    return {**result[0], "gradients": whole_tensors(result, "gradients")}


def worst_difference(results: list[Any], expected: dict[str, Any]) -> tuple[float, str]:
    """Largest difference of a gradient relative to its largest element, and whose it is."""
    gradients = whole_tensors(results, "gradients")
    assert gradients.keys() == expected["gradients"].keys()
    differences = []
    for name, value in expected["gradients"].items():
        got = gradients[name][: len(value)]  # a layout may pad the vocabulary further
        differences.append((float((got - value).abs().max() / value.abs().max().clamp(min=1e-8)), name))
    return max(differences)


@pytest.mark.parametrize("assembly", ASSEMBLIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_equal_one_process(assembly: str, layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    results, expected = run(world_size, assembly, overrides), reference(assembly)
    for result in results:
        assert result["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE)
    difference, name = worst_difference(results, expected)
    assert difference <= TOLERANCE, f"gradient of {name} differs by {difference:.1e}"


@pytest.mark.parametrize("frozen", ["language", "vision"])
def test_frozen_parts_have_no_gradient_and_change_no_other(frozen: str) -> None:
    overrides = {"training.freeze": f"[{frozen}]"}
    results = run(2, "cross_attention", {"parallel.tensor": 2, **overrides})
    gradients, full = whole_tensors(results, "gradients"), reference("cross_attention")["gradients"]
    assert gradients and len(gradients) < len(full)
    for name, value in gradients.items():
        assert float((value - full[name]).abs().max() / full[name].abs().max().clamp(min=1e-8)) <= TOLERANCE, name


def test_indivisible_vocabulary_is_padded_without_changing_the_loss() -> None:
    # 67 tokens: 68 rows on two ranks, the 68th must not take part in the softmax
    result = run(2, "merged", {"parallel.tensor": 2})[0]
    name, shape = next((n, s) for n, s, _, _ in result["gradients"] if n.endswith("output_layer.weight"))
    assert shape[0] == 68, name
    assert result["loss"] == pytest.approx(reference("merged")["loss"], rel=1e-6)
