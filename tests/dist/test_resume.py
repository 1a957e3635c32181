"""Checkpoints across layouts: weights equal, training goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.harness import run_distributed
from tests.dist.workers import whole_tensors

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2_sp": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "dp2": (2, {}),
    "pp2": (2, {"parallel.pipeline": 2}),
    "dp2_bf16": (2, {"training.precision": "bf16"}),
    "tp2_bf16_plain_optimizer": (
        2,
        {"parallel.tensor": 2, "parallel.distributed_optimizer": False, "training.precision": "bf16"},
    ),
}


def save(layout: str, directory: Path, more: int = 2) -> list[dict[str, Any]]:
    world_size, overrides = LAYOUTS[layout]
    args = {
        "assembly": "cross_attention",
        "overrides": overrides,
        "directory": str(directory),
        "steps": 2,
        "more": more,
    }
    return run_distributed(world_size, "tests.dist.workers:save_after", args)


def load(layout: str, directory: Path, more: int = 2) -> list[dict[str, Any]]:
    world_size, overrides = LAYOUTS[layout]
    args = {"assembly": "cross_attention", "overrides": overrides, "directory": str(directory), "more": more}
    return run_distributed(world_size, "tests.dist.workers:load_and_go_on", args)


@pytest.mark.parametrize("layout", ["tp2_sp", "dp2", "dp2_bf16", "tp2_bf16_plain_optimizer"])
def test_resuming_in_the_same_layout_is_bitwise(layout: str, tmp_path: Path) -> None:
    uninterrupted, resumed = save(layout, tmp_path), load(layout, tmp_path)
    for straight, again in zip(uninterrupted, resumed, strict=True):
        assert straight["curve"] == again["curve"]
        for (name, _, _, a), (_, _, _, b) in zip(straight["last"], again["last"], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("source, target", [("tp2_sp", "pp2"), ("pp2", "one"), ("dp2", "tp2_sp"), ("one", "dp2")])
def test_resuming_in_another_layout(source: str, target: str, tmp_path: Path) -> None:
    uninterrupted, resumed = save(source, tmp_path), load(target, tmp_path)
    before, after = whole_tensors(uninterrupted, "weights"), whole_tensors(resumed, "weights")
    for name, value in before.items():
        rows = min(len(value), len(after[name]))  # vocabulary padding differs
        assert torch.equal(value[:rows], after[name][:rows]), name
    for (loss, norm), (other_loss, other_norm) in zip(
        uninterrupted[0]["curve"], resumed[0]["curve"], strict=True
    ):
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)


def test_weights_start_another_model_and_new_parts_stay_random(tmp_path: Path) -> None:
    """A stage that adds cross-attention to a model trained without it."""
    args: dict[str, Any] = {
        "assembly": "merged",
        "overrides": {"parallel.tensor": 2},
        "directory": str(tmp_path),
        "steps": 1,
        "more": 0,
    }
    saved = whole_tensors(run_distributed(2, "tests.dist.workers:save_after", args), "weights")
    args = {"assembly": "cross_attention", "overrides": {}, "directory": str(tmp_path)}
    (result,) = run_distributed(1, "tests.dist.workers:load_only_weights", args)
    assert result["missing"] == ["connector", "cross_attention"]
    loaded = whole_tensors([result], "weights")
    for name in loaded.keys() & saved.keys():
        assert torch.equal(loaded[name], saved[name][: len(loaded[name])]), name
