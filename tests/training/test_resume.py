"""A run that is killed at a random step and started again ends bitwise equal to one that was not."""

from __future__ import annotations

import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megamm.engine.checkpoint import resolve
from megamm.engine.manifest import list_checkpoints
from megamm.training.metrics import read_metrics
from tests.training.runs import (
    STEPS,
    assert_same_end,
    curve,
    kill,
    run,
    start,
    wait_for_step,
    write_recipe,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    """Folder of a finished single-process run."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, dataset_dir, tokenizer_dir)
    assert run(recipe, folder / "log") == 0, (folder / "log").read_text()
    return folder


def test_kill_at_a_random_step(
    tmp_path: Path, uninterrupted: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    step = random.SystemRandom().randint(1, STEPS - 1)
    process = start(recipe, tmp_path / "log")
    try:
        wait_for_step(tmp_path / "run", step, process)
    finally:
        kill(process)
    assert run(recipe, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_same_end(uninterrupted / "run", tmp_path / "run")


def test_kill_under_tensor_parallelism(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    folders = [tmp_path / name for name in ("straight", "killed")]
    recipes = []
    for folder in folders:
        folder.mkdir()
        recipes.append(write_recipe(folder, dataset_dir, tokenizer_dir, "cross_attention"))
    layout = "--parallel.tensor=2"
    assert run(recipes[0], tmp_path / "log", layout, processes=2) == 0, (tmp_path / "log").read_text()
    process = start(recipes[1], tmp_path / "log", layout, processes=2, fresh=True)
    try:
        wait_for_step(folders[1] / "run", random.SystemRandom().randint(3, STEPS - 1), process)
    finally:
        kill(process)
    assert run(recipes[1], tmp_path / "log", layout, processes=2) == 0, (tmp_path / "log").read_text()
    assert_same_end(folders[0] / "run", folders[1] / "run")


def test_a_packed_run_goes_on_with_other_processes(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    """Steps use different numbers of samples; the checkpoint says where the next one begins."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    log, one, two = tmp_path / "log", tmp_path / "one", tmp_path / "two"
    packed = ["--data.pack=true", "--data.sequence_length=256", "--training.micro_batch_size=2"]
    packed += [f"--optimizer.decay_steps={STEPS}"]
    assert run(recipe, log, *packed, f"--run_dir={one}") == 0, log.read_text()
    packed += [f"--run_dir={two}"]
    assert run(recipe, log, *packed, "--training.steps=5") == 0, log.read_text()
    assert run(recipe, log, *packed, processes=2) == 0, log.read_text()
    for straight, resumed in zip(curve(one), curve(two), strict=True):
        assert straight[:2] == resumed[:2] and resumed == pytest.approx(straight, rel=1e-4)
    consumed = [0] + [row[1] for row in curve(one)]
    assert len({after - before for before, after in pairwise(consumed)}) > 1
    assert "of the positions of packed rows were padding" in log.read_text()


def test_a_resumed_run_has_the_rates_of_its_recipe(tmp_path: Path, uninterrupted: Path) -> None:
    """Not those that lie in the checkpoint with the optimizer's state, also where its groups are others."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted / "run", run_dir)
    shutil.rmtree(list_checkpoints(run_dir / "checkpoints")[0])
    changed = ["--optimizer.schedule=constant", "--optimizer.lr=0.0005", "--optimizer.weight_decay=0.3"]
    changed += ["--optimizer.parts=[{part: vision, lr: 0.0002}]"]
    log = tmp_path / "log"
    assert run(uninterrupted / "recipe.yaml", log, f"--run_dir={run_dir}", *changed) == 0, log.read_text()
    assert f"resumed at step {STEPS - 3}" in log.read_text()
    assert [row["lr"] for row in read_metrics(run_dir / "metrics.jsonl")][-3:] == [0.0005] * 3
    common = torch.load(resolve(run_dir) / "shards" / "common.pt", weights_only=False)
    groups = common["optimizer"]["optimizer"]["param_groups"]
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {
        (rate, decay) for rate in (0.0005, 0.0002) for decay in (0.3, 0.0)
    }
    assert {group["step"] for group in groups} == {STEPS}


def test_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, uninterrupted: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted / "run", run_dir)
    newest = list_checkpoints(run_dir / "checkpoints")[0]
    damaged = sorted((newest / "shards").glob("*.distcp"))[0]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    recipe, override = uninterrupted / "recipe.yaml", f"--run_dir={run_dir}"
    strict_log, log = tmp_path / "strict.log", tmp_path / "log"

    assert run(recipe, strict_log, override, "--resume.strict=true") == 2
    assert str(damaged) in strict_log.read_text() and "Traceback" not in strict_log.read_text()

    assert run(recipe, log, override) == 0
    assert f"passed over: {damaged}" in log.read_text()
    assert f"resumed at step {STEPS - 3}" in log.read_text()
    assert "the recipe is not the one that step_00000009 was saved with" in log.read_text()  # its run_dir
    assert_same_end(uninterrupted / "run", run_dir)

    for checkpoint in list_checkpoints(run_dir / "checkpoints"):
        (checkpoint / "recipe.yaml").write_text("")
    assert run(recipe, log, override) == 2, "must not start again from step 0"
    assert "every checkpoint is damaged" in log.read_text()
