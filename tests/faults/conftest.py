"""A tiny trained model and all that the subcommands need beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.commands import Ground, lay
from tests.faults.run_command import run_command


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
