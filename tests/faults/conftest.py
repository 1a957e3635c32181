"""What the tests break: a finished run, and a tiny trained model with all that the subcommands need beside
it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.checkpoints import Copy
from tests.faults.commands import Ground, lay
from tests.faults.run_command import run_command
from tests.training.runs import run, write_recipe

FROZEN = "--training.freeze=[vision]"
OVERRIDES = ("--training.steps=9", "--optimizer.decay_steps=12")


@pytest.fixture(scope="session")
def session_ground(
    tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path, image_folder: Path
) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    ground = lay(folder, dataset_dir, tokenizer_dir, image_folder)
    export = ["convert", "export", "--checkpoint", str(ground.run), "--out", str(ground.hugging_face)]
    assert run_command(export, folder / "log").code == 0, (folder / "log").read_text()
    return ground


@pytest.fixture
def ground(session_ground: Ground) -> Ground:
    """Nothing of it may be changed but what is in `out`, which is empty."""
    assert not list(session_ground.out.iterdir())
    return session_ground


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    """A folder with recipe.yaml and run/, which has checkpoints of steps 3, 6 and 9, with frozen
    weights. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, dataset_dir, tokenizer_dir)
    assert run(recipe, folder / "log", FROZEN, *OVERRIDES) == 0, (folder / "log").read_text()
    return folder


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Copy:
    return Copy(trained, tmp_path)
