"""Rates and weight decay of single parts, in every layout, against torch's AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist.harness import run_distributed
from tests.dist.stage_workers import RATES

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"parallel.distributed_optimizer": False}),
    "data": (2, {}),
    "tensor_pipeline": (
        4,
        {"parallel.tensor": 2, "parallel.pipeline": 2, "model.language.tie_embeddings": True},
    ),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("layout", [pytest.param("one", marks=SLOW), "data", "tensor_pipeline"])
def test_every_weight_moves_as_its_group_says(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    args = {"kind": "cross_attention", "overrides": overrides}
    results = run_distributed(world_size, "tests.dist.stage_workers:largest_error_of_rates", args)
    for worst, sizes in results:
        assert worst < 1e-6
        assert len(sizes) == 8  # three parts and the rest, each with and without decay
    if layout == "tensor_pipeline":
        assert 0 in results[3][1] and 0 not in results[0][1]  # the last stage has neither part


@pytest.mark.parametrize("distributed", [True, pytest.param(False, marks=SLOW)])
def test_a_resumed_run_has_the_same_groups(distributed: bool, tmp_path: Path) -> None:
    overrides = {**RATES, "parallel.pipeline": 2, "parallel.distributed_optimizer": distributed}
    args: dict[str, Any] = {"assembly": "cross_attention", "overrides": overrides}
    args |= {"directory": str(tmp_path), "more": 3}
    straight = run_distributed(2, "tests.dist.workers:save_after", {**args, "steps": 2})
    resumed = run_distributed(2, "tests.dist.workers:load_and_go_on", args)
    for one, other in zip(straight, resumed, strict=True):
        assert one["curve"] == other["curve"]


def test_a_stage_of_a_pipeline_that_trains_nothing_resumes(tmp_path: Path) -> None:
    """With a replicated optimizer, which has no state there."""
    overrides = {"parallel.pipeline": 2, "parallel.distributed_optimizer": False}
    overrides |= {"training.freeze": "[vision, language]"}
    args: dict[str, Any] = {
        "assembly": "merged",
        "overrides": overrides,
        "directory": str(tmp_path),
        "more": 1,
    }
    straight = run_distributed(2, "tests.dist.workers:save_after", {**args, "steps": 2})
    resumed = run_distributed(2, "tests.dist.workers:load_and_go_on", args)
    assert [result["curve"] for result in straight] == [result["curve"] for result in resumed]
