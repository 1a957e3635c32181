"""F15: a run that saves all the time needs no more memory and no more open files at its end than at its
start."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megamm.training.metrics import read_metrics
from tests.training.runs import Ranks, kill, start, wait_for_step, write_recipe

WARM_UP = 0.3  # of the steps: buffers that are kept are made in the first ones


@pytest.mark.parametrize(
    "steps, processes, settings",
    [
        (100, 1, []),
        pytest.param(500, 1, [], marks=pytest.mark.faults),
        pytest.param(500, 2, ["--parallel.tensor=2"], marks=pytest.mark.faults),
        pytest.param(500, 2, ["--data.workers=1", "--log.tensorboard=true"], marks=pytest.mark.faults),
    ],
)
def test_no_more_memory_and_no_more_files(
    steps: int, processes: int, settings: list[str], tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path
) -> None:
    recipe, run_dir = write_recipe(tmp_path, dataset_dir, tokenizer_dir), tmp_path / "run"
    saving = [f"--training.steps={steps}", "--checkpoint.interval=5", "--checkpoint.keep=2", *settings]
    process = start(recipe, tmp_path / "log", *saving, processes=processes)
    try:
        wait_for_step(run_dir, int(WARM_UP * steps), process)
        pids = process.pids if isinstance(process, Ranks) else [process.pid]
        before, after = [open_files(pid) for pid in pids], list[int]()
        while process.poll() is None:
            with_files = [open_files(pid) for pid in pids]
            after = with_files if all(with_files) else after
            time.sleep(0.05)
        assert process.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        kill(process)
    # a save has two files open for a moment
    assert after and all(now <= then + 4 for then, now in zip(before, after, strict=True)), (before, after)
    memory = [row["memory"] for row in read_metrics(run_dir / "metrics.jsonl")][int(WARM_UP * steps) :]
    assert len(memory) == steps - int(WARM_UP * steps)
    assert slope(memory) * steps < 0.02 * memory[0], "bytes over the whole run"
    assert len(list((run_dir / "checkpoints").iterdir())) == 2


def open_files(pid: int) -> int:
    """How many a process has; 0 if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def slope(values: list[int]) -> float:
    """Of the line through the values (least squares), per step."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((n - middle) ** 2 for n in range(len(values)))
    return sum((n - middle) * (value - mean) for n, value in enumerate(values)) / spread


def test_the_slope_sees_growth() -> None:
    assert slope([7, 7, 7, 7]) == 0 and slope([1, 3, 5, 7]) == pytest.approx(2)
