"""Checkpoints across layouts: weights equal, training goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamm.engine.checkpoint import read_weights
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


@pytest.mark.parametrize(
    "source, target", [("tp2_sp", "pp2"), ("pp2", "one"), ("dp2", "tp2_sp"), ("one", "dp2")]
)
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


def save_on_a_full_disk(directory: str) -> list[str]:
    """What rank 1's full disk makes of a save, and of the next one when there is space again."""
    import os

    from megamm.engine import groups, manifest, sharded_files
    from megamm.engine.checkpoint import Progress
    from megamm.errors import RunError
    from tests.dist.tiny import tiny_recipe
    from tests.dist.workers import Run

    def full(*args: object) -> None:
        raise OSError(28, os.strerror(28))

    run = Run(tiny_recipe("merged", {"parallel.pipeline": 2, "checkpoint.max_failures": 0}))
    run.step(0)
    checkpoints = run.checkpoints(Path(directory))
    write, said = sharded_files._write_value, []
    if run.layout.pp_rank == 1:
        sharded_files._write_value = full
    checkpoints.save(Progress(1, 8))
    try:
        for step in range(1, 1000):
            run.step(step)
            checkpoints.poll()
    except RunError as error:
        said.append(str(error))
    dist.barrier()  # until rank 0 has tidied up
    said += [path.name for path in Path(directory).iterdir()]
    dist.barrier()  # until all have looked
    sharded_files._write_value = write
    checkpoints.save(Progress(2, 16))
    checkpoints.wait()
    said += [path.name for path in manifest.list_checkpoints(Path(directory))]
    groups.shutdown()
    return said


def test_a_full_disk_of_one_rank_stops_all_at_the_next_poll(tmp_path: Path) -> None:
    args = {"directory": str(tmp_path)}
    for said in run_distributed(2, "tests.dist.test_resume:save_on_a_full_disk", args):
        assert len(said) == 2 and said[1] == "step_00000002"
        assert "step_00000001: cannot be written (No space left on device); free space" in said[0]


def save_again_elsewhere(directory: str) -> int:
    """Load a checkpoint of another layout, train a step, save; how many tensors of this rank are trained."""
    from megamm.engine import groups
    from megamm.engine.checkpoint import Progress
    from tests.dist.tiny import tiny_recipe
    from tests.dist.workers import Run

    frozen = {"training.freeze": "[vision,connector,language]"}
    run = Run(tiny_recipe("cross_attention", {**frozen, "parallel.pipeline": 4, "seed": 99}))
    checkpoints = run.checkpoints(Path(directory))
    progress = checkpoints.load_newest()
    assert progress is not None
    run.step(progress.step)
    checkpoints.save(Progress(progress.step + 1, 0))
    checkpoints.wait()
    groups.shutdown()
    return sum(p.requires_grad for model in run.models for p in model.parameters())


def test_frozen_weights_of_another_layout_are_taken_over(tmp_path: Path) -> None:
    """Four stages, two of which train nothing, go on from two tensor-parallel ranks: the vocabulary is padded
    otherwise, and no frozen weight is written again."""
    frozen = {"training.freeze": "[vision,connector,language]", "parallel.tensor": 2}
    args = {
        "assembly": "cross_attention",
        "overrides": frozen,
        "directory": str(tmp_path),
        "steps": 2,
        "more": 0,
    }
    before = whole_tensors(run_distributed(2, "tests.dist.workers:save_after", args), "weights")
    trained = run_distributed(4, "tests.dist.test_resume:save_again_elsewhere", {"directory": str(tmp_path)})
    assert trained[0] == trained[2] == 0 < trained[1]
    newest = tmp_path / "step_00000003"
    files = sorted((newest / "frozen").iterdir())
    assert len(files) > 2 and {path.stat().st_nlink for path in files} == {2}
    after = read_weights(newest)
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name][:67], after[name][:67])}
    assert changed and all(".gated_cross_attention." in name for name in changed)
