"""A run that is killed and goes on with other processes and loaders trains on the same samples (F10).

tests/data/test_any_resume.py has the stream of the loader, bit by bit, in many more shapes.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.faults import recorded
from tests.training.runs import STEPS, kill, run, start, wait_for_step, write_recipe

PACKED = ["--data.pack=true", "--data.sequence_length=256", "--training.micro_batch_size=2"]
SHORT = ["--training.micro_batch_size=2"]  # four micro-batches in a step of one process


def samples(
    folder: Path, recipe: Path, overrides: list[str], attempts: list[list[str]]
) -> list[recorded.Notes]:
    """What each attempt of a run used that is killed, but for the last one, some time after a random step.

    Args:
        attempts: how many processes each has, and its overrides.
    """
    draw, notes, log = random.SystemRandom(), folder / "notes", folder / "log"
    notes.mkdir(parents=True)
    noted = {"target": "tests.faults.recorded:megamm", recorded.FOLDER: str(notes)}
    arguments = [*overrides, f"--run_dir={folder / 'run'}", f"--optimizer.decay_steps={STEPS}"]
    arguments.append("--checkpoint.asynchronous=false")  # a step later there is a checkpoint to go on from
    *killed, last = attempts
    used: list[recorded.Notes] = []
    seen: set[Path] = set()

    def take_notes() -> None:
        files = set(notes.iterdir())
        used.append(recorded.read(files - seen))
        seen.update(files)

    for number, (processes, *more) in enumerate(killed):
        process = start(recipe, log, *arguments, *more, processes=int(processes), **noted)
        try:
            wait_for_step(folder / "run", draw.randint(4 * number + 4, 4 * number + 6), process)
            time.sleep(draw.uniform(0, 0.1))  # to be in the middle of a step
        finally:
            kill(process)
        take_notes()
    processes, *more = last
    code = run(recipe, log, *arguments, *more, processes=int(processes), **noted)
    assert code == 0, log.read_text()
    if killed:
        assert "resumed at step" in log.read_text()
    take_notes()
    return used


def check(
    tmp_path: Path,
    dataset: Path,
    tokenizer: Path,
    overrides: list[str],
    attempts: list[list[str]],
) -> None:
    recipe = write_recipe(tmp_path, dataset, tokenizer)
    (whole,) = samples(tmp_path / "whole", recipe, overrides, [["1"]])
    *before, after = samples(tmp_path / "killed", recipe, overrides, attempts)
    assert len(whole) == STEPS
    assert sum(len(ids) for ids, _ in whole.values()) > 50, "the epoch ends on the way"
    assert 0 < len(after) < STEPS
    for used, (processes, *_) in zip([*before, after], attempts, strict=True):
        for begin, (ids, ranks) in used.items():
            is_whole = ranks == list(range(int(processes)))
            assert is_whole or used is not after, begin
            if is_whole:  # else a kill came before all of its processes had taken notes
                assert ids == whole[begin][0], begin
    assert set().union(*before, after) == whole.keys(), "no step was left out"


def test_killed_and_resumed_with_others(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    draw = random.SystemRandom()
    one, two = ["1", f"--data.workers={draw.randint(0, 1)}"], ["2", f"--data.workers={draw.randint(0, 2)}"]
    attempts = draw.choice([[one, two], [two, one]])
    overrides = draw.choice([PACKED, SHORT])
    print(attempts, overrides)
    check(tmp_path, dataset_dir, tokenizer_dir, overrides, attempts)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("overrides", [PACKED, SHORT], ids=["packed", "padded"])
@pytest.mark.parametrize("attempts", [["1", "2"], ["2", "1"], ["2", "1", "2"], ["1", "1"]])
def test_killed_and_resumed_with_all_others(
    attempts: list[str],
    overrides: list[str],
    tmp_path: Path,
    dataset_dir: Path,
    tokenizer_dir: Path,
) -> None:
    workers = random.SystemRandom().sample(range(4), len(attempts))
    print(workers)
    drawn = [[count, f"--data.workers={w}"] for count, w in zip(attempts, workers, strict=True)]
    check(tmp_path, dataset_dir, tokenizer_dir, overrides, drawn)
