"""What is being saved is secured before an update changes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamm import cli
from megamm.engine.checkpoint import Checkpoints
from megamm.training import loop
from tests.training.runs import write_recipe


def test_every_update_comes_behind_that(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, calls = write_recipe(tmp_path, dataset_dir, tokenizer_dir), []
    secure, update = Checkpoints.before_update, loop.update

    def secured(checkpoints: Checkpoints) -> None:
        calls.append("secure")
        secure(checkpoints)

    def updated(*args: Any) -> float:
        calls.append("update")
        return update(*args)

    monkeypatch.setattr(Checkpoints, "before_update", secured)
    monkeypatch.setattr(loop, "update", updated)
    assert cli.main(["train", str(recipe), "--training.steps=3", "--checkpoint.interval=1"]) == 0
    assert calls == ["secure", "update"] * 3
