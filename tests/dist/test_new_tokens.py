"""The rows of new tokens are trained within a frozen language model, and nothing else of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamm.config import EMBEDDING, OUTPUT, part_of
from tests.dist.harness import run_distributed
from tests.dist.tiny import VOCAB
from tests.dist.workers import whole_tensors

ADDED = 3
NEW = slice(VOCAB - ADDED, VOCAB)
STAGE: dict[str, Any] = {
    "model.language.added_vocab": ADDED,
    "training.freeze": "[vision, language]",
    "training.unfreeze.new_tokens": True,
    "optimizer.lr": 0.01,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"parallel.tensor": 2, "parallel.sequence": True}),
    "data_bf16": (2, {"training.precision": "bf16"}),
    "pipeline_tied": (2, {"parallel.pipeline": 2, "model.language.tie_embeddings": True}),
    "one_tied": (1, {"model.language.tie_embeddings": True, "parallel.distributed_optimizer": False}),
}

SLOW = ("data_bf16", "one_tied")


def train(world_size: int, overrides: dict[str, Any], steps: int) -> dict[str, dict[str, torch.Tensor]]:
    args = {"kind": "merged", "overrides": overrides, "steps": steps}
    results = run_distributed(world_size, "tests.dist.stage_workers:train", args)
    found = {key: whole_tensors(results, key) for key in ("before", "gradients", "after")}
    return {**found, "curve": results[0]["curve"]}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS],
)
def test_only_the_new_rows_change(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    tied = "model.language.tie_embeddings" in overrides
    found = train(world_size, {**STAGE, **overrides}, 3)
    before, after = found["before"], found["after"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    rows = {EMBEDDING} if tied else {EMBEDDING, OUTPUT}
    assert {name for name in changed if part_of(name) == "language"} == rows
    assert {part_of(name) for name in changed} == {"language", "connector"}
    for name in rows:
        is_new = torch.zeros(len(before[name]), dtype=torch.bool)
        is_new[NEW] = True
        differs = (before[name] != after[name]).any(dim=1)
        assert torch.equal(differs, is_new), name

    # the same gradients as without any freezing
    if layout == "data_bf16":
        return
    everything = {key: STAGE[key] for key in ("model.language.added_vocab", "optimizer.lr")}
    reference = train(1, {**everything, **({"model.language.tie_embeddings": True} if tied else {})}, 0)
    for name in rows:
        got, wanted = found["gradients"][name], reference["gradients"][name]
        torch.testing.assert_close(got[NEW], wanted[NEW], rtol=1e-4, atol=1e-6)
        assert not got[: NEW.start].any() and not got[NEW.stop :].any()
