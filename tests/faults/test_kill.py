"""A rank is killed at any moment: torchrun starts the ranks again, and the run ends as if nothing had
happened."""

from __future__ import annotations

import random
from pathlib import Path

import psutil
import pytest

from tests.faults.launches import LAYOUTS, Launch
from tests.training.runs import STEPS, assert_same_end, curve, run, write_recipe

MANY_KILLS = 20


@pytest.fixture
def dice() -> random.Random:
    """Other kills in every run of the tests; a failure shows the seed."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


def straight(folder: Path, layout: str, dataset: Path, tokenizer: Path) -> Path:
    """Run directory of an uninterrupted run."""
    folder.mkdir()
    recipe = write_recipe(folder, dataset, tokenizer)
    assert run(recipe, folder / "log", *LAYOUTS[layout], processes=2) == 0, (folder / "log").read_text()
    return folder / "run"


def kill_at(launch: Launch, run_dir: Path, step: int, rank: int) -> None:
    """SIGKILL for one rank once `step` is logged, or while it starts again."""
    launch.wait_for_step(run_dir, step)
    while (victim := launch.ranks().get(rank)) is None:
        assert launch.process.poll() is None, launch.output()[-3000:]
    victim.kill()
    psutil.wait_procs([victim], timeout=10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_costs_nothing(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, layout: str, dice: random.Random
) -> None:
    step, rank = dice.randrange(1, STEPS - 3), dice.randrange(2)
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    with Launch(recipe, tmp_path / "log", *LAYOUTS[layout]) as launch:
        kill_at(launch, tmp_path / "run", step, rank)
        assert launch.wait() == 0, launch.output()[-5000:]
    assert "Traceback" not in launch.output()
    samples = [row[1] for row in curve(tmp_path / "run")]
    assert samples == [8 * done for done in range(1, STEPS + 1)]
    assert_same_end(straight(tmp_path / "straight", layout, dataset_dir, tokenizer_dir), tmp_path / "run")
