"""A full disk costs rows of the log, never the run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamm.training.log_files import AppendedFile
from megamm.training.metrics import read_metrics
from tests.training.runs import run, write_recipe

FULL = Path("/dev/full")  # every write finds no space


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_rows_are_lost_and_later_ones_are_not(small_disk: Path) -> None:
    said: list[str] = []
    path = small_disk / "metrics.jsonl"
    file, rows = (
        AppendedFile(path, said.append),
        [f'{{"step": {n}, "x": "{"y" * 1000}"}}\n' for n in range(200)],
    )
    for row in rows[:150]:
        file.write(row)
    assert said == [f"{path}: cannot be written (No space left on device); training goes on without it"]
    written = path.stat().st_size
    os.truncate(path, written - 20_000)  # somebody makes room
    for row in rows[150:155]:
        file.write(row)
    file.close()
    steps = [row["step"] for row in read_metrics(path)]
    assert steps[-5:] == [150, 151, 152, 153, 154] and steps[:-5] == list(range(len(steps) - 5))


def test_a_run_whose_log_is_full_goes_on(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    recipe, run_dir = write_recipe(tmp_path, dataset_dir, tokenizer_dir), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "log.txt").symlink_to(FULL)
    assert run(recipe, FULL, "--training.steps=4") == 0, "its output and log.txt go to a full disk"
    assert [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")] == [1, 2, 3, 4]
