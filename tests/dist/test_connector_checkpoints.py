"""Checkpoints of the connectors and gated blocks across layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.harness import run_distributed
from tests.dist.workers import whole_tensors


@pytest.mark.parametrize("kind", ["qformer", "idefics"])
def test_saved_in_two_shards_loaded_whole(kind: str, tmp_path: Path) -> None:
    """Every tensor bit for bit: sharded biases, SwiGLU's two halves, norms of heads, frozen flags."""
    args: dict[str, Any] = {"assembly": kind, "directory": str(tmp_path), "more": 1}
    sharded = {"parallel.tensor": 2, "parallel.sequence": True}
    saved = run_distributed(2, "tests.dist.workers:save_after", {**args, "overrides": sharded, "steps": 1})
    loaded = run_distributed(1, "tests.dist.workers:load_and_go_on", {**args, "overrides": {}})
    before, after = whole_tensors(saved, "weights"), whole_tensors(loaded, "weights")
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(before[name][: len(value)], value), name  # the vocabulary was padded for two
    assert loaded[0]["curve"][0][0] == pytest.approx(saved[0]["curve"][0][0], rel=1e-6)
