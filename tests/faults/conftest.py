"""A finished run whose checkpoints the tests copy and break."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.checkpoints import Copy
from tests.training.runs import run, write_recipe

FROZEN = "--training.freeze=[vision]"
OVERRIDES = ("--training.steps=9", "--optimizer.decay_steps=12")


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
