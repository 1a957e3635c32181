"""A run that others have to end like."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import run, write_recipe


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    """Run directory of two processes that torchrun started."""
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, dataset_dir, tokenizer_dir)
    assert run(recipe, folder / "log", processes=2, fresh=True) == 0, (folder / "log").read_text()
    return folder / "run"
