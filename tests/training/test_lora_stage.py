"""A stage that trains adapters on frozen weights: where it starts, what it changes, that it resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megamm.engine.checkpoint import read_weights, resolve
from megamm.inference import load
from megamm.models.freezing import part_of
from tests.training.runs import curve, newest_state, run, write_recipe

STEPS = 6
LORA = [
    "--model.lora.rank=4",
    "--model.lora.alpha=8",
    "--model.lora.dropout=0.2",
    "--model.lora.targets=[q, v, o, up, down]",
    "--training.freeze=[vision, language]",
    f"--training.steps={STEPS}",
]
Stages = tuple[Path, Path]  # the run directories of the two stages


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), dataset_dir, tokenizer_dir)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, recipe: Path) -> Stages:
    """The whole model for three steps, then adapters on it."""
    folder = tmp_path_factory.mktemp("stages")
    first, second, log = folder / "first", folder / "second", folder / "log"
    assert run(recipe, log, "--training.steps=3", f"--run_dir={first}") == 0, log.read_text()
    start = [f"--training.init_from={first}", f"--run_dir={second}"]
    assert run(recipe, log, *LORA, *start) == 0, log.read_text()
    assert "; lora start from random weights" in log.read_text()
    return first, second


def test_only_adapters_and_connector_change(stages: Stages) -> None:
    before, after = (read_weights(resolve(run_dir)) for run_dir in stages)
    assert {part_of(name) for name in after.keys() - before.keys()} == {"lora"}
    changed = {part_of(name) for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"connector"}
    assert all(after[name].abs().max() > 0 for name in after if part_of(name) == "lora")


def test_a_stage_goes_on_where_it_was_stopped(stages: Stages, recipe: Path, tmp_path: Path) -> None:
    """Bit for bit, dropout included."""
    _, second = stages
    again = tmp_path / "again" / "checkpoints"
    again.mkdir(parents=True)
    shutil.copytree(second / "checkpoints" / "step_00000003", again / "step_00000003")
    assert run(recipe, tmp_path / "log", *LORA, f"--run_dir={again.parent}") == 0, (
        tmp_path / "log"
    ).read_text()
    assert curve(again.parent) == curve(second)[3:]
    wanted, got = newest_state(second), newest_state(again.parent)
    assert wanted.keys() == got.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], got[name])] == []


def test_two_processes_leave_out_the_same(stages: Stages, recipe: Path, tmp_path: Path) -> None:
    first, second = stages
    start = [f"--training.init_from={first}", "--parallel.tensor=2", "--parallel.sequence=true"]
    log = tmp_path / "log"
    assert run(recipe, log, *LORA, *start, f"--run_dir={tmp_path / 'two'}", processes=2) == 0, log.read_text()
    for single, several in zip(curve(second), curve(tmp_path / "two"), strict=True):
        assert several == pytest.approx(single, rel=1e-4)


def test_the_next_stage_takes_the_adapters_along(stages: Stages, recipe: Path, tmp_path: Path) -> None:
    """Or adds them to the weights that they adapt, if its model has none; other adapters are refused."""
    _, second = stages
    log, third = tmp_path / "log", tmp_path / "third"
    start = [f"--training.init_from={second}", f"--run_dir={third}", "--optimizer.warmup_steps=1"]
    # one step of warm-up, whose learning rate is 0
    assert run(recipe, log, *LORA, *start, "--training.steps=1", "--seed=9") == 0, log.read_text()
    before, after = (read_weights(resolve(run_dir)) for run_dir in (second, third))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert load(third).recipe.model.lora.targets == ["q", "v", "o", "up", "down"]

    without = tmp_path / "without"
    code = run(recipe, log, *start, f"--run_dir={without}", "--training.steps=1", "--seed=9")
    assert code == 0, log.read_text()
    assert "adapters (LoRA) added to the 8 weights that they adapt" in log.read_text()
    assert "trained there: connector, lora; trained here: vision, connector, language" in log.read_text()
    after = read_weights(resolve(without))
    assert {part_of(name) for name in before.keys() - after.keys()} == {"lora"}
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == 8 and all("linear_" in name for name in changed)
    assert run(recipe, log, *LORA, *start, f"--run_dir={tmp_path / 'wide'}", "--model.lora.rank=8") == 2
    assert "model.lora.rank: there 4, here 8" in log.read_text().splitlines()[-1]
