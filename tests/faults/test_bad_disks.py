"""F5: disks that are full, read-only or somebody else's. All ranks know, nobody hangs, what was saved stays
good, and training goes on for as long as the recipe allows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megamm.engine.manifest import list_checkpoints, verify
from tests.dist.harness import run_distributed
from tests.faults.conftest import FROZEN, OVERRIDES
from tests.faults.disks import FAULTS, small_disk, used
from tests.training.runs import curve, run

draw = random.SystemRandom()


def check(fault: str, leave: float, asynchronous: bool, tmp_path: Path) -> None:
    words = FAULTS[fault][2]
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)  # so that nobody comes through
    with small_disk(tmp_path / "disk", "64m") as disk:
        arguments = {"directory": str(disk / "checkpoints"), "fault": fault, "leave": leave}
        target = "tests.faults.disks:saves_on_a_bad_disk"
        ranks = run_distributed(2, target, {**arguments, "asynchronous": asynchronous}, timeout=150)
    for results in ranks:
        happened, seconds, steps, others = zip(*results, strict=True)
        assert max(seconds) < 30 and not any(others)
        assert list(steps) == [[1]] * 3 + [[4, 1]] * 4 + [[8, 4, 1]] * 2
        for place, before, number in ((1, 1, 1), (2, 1, 2), (4, 4, 1), (5, 4, 2)):
            assert happened[place].startswith("warning: no checkpoint was saved, the last good one is"), (
                happened
            )
            assert f"step_{before:08d}: " in happened[place] and f"({words}); " in happened[place]
            assert happened[place].endswith(f"tries again ({number} in a row, 2 are allowed)")
        for place, before in ((6, 4), (8, 8)):
            assert happened[place].startswith("RunError: ") and f"({words}); free space" in happened[place]
            assert happened[place].endswith(
                f"the last good checkpoint is {disk}/checkpoints/step_{before:08d}"
            )
        assert all(happened[place].startswith("saved ") for place in (0, 3, 7))


def test_a_bad_disk(tmp_path: Path) -> None:
    fault, leave, asynchronous = draw.choice(list(FAULTS)), draw.random(), draw.choice([True, False])
    print(fault, leave, asynchronous)  # shown if it fails
    check(fault, leave, asynchronous, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    "fault, leave",
    [
        *(("full", leave) for leave in (0.0, draw.uniform(0, 0.1), draw.random(), draw.random(), 1.0)),
        ("read-only", 0.0),
        ("permission", 0.0),
    ],
)
def test_every_bad_disk(fault: str, leave: float, asynchronous: bool, tmp_path: Path) -> None:
    print(leave)
    check(fault, leave, asynchronous, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_whose_disk_becomes_full(processes: int, trained: Path, tmp_path: Path) -> None:
    """It trains to its end, and fails then, because the last checkpoint has to be saved."""
    size = used(list_checkpoints(trained / "run/checkpoints")[1])
    log, run_dir = tmp_path / "log", tmp_path / "run"
    options = [FROZEN, *OVERRIDES, f"--run_dir={run_dir}"]
    with small_disk(tmp_path / "disk", f"{int(1.5 * size) // 1024}k") as disk:
        run_dir.mkdir()
        (run_dir / "checkpoints").symlink_to(disk)
        assert run(trained / "recipe.yaml", log, *options, processes=processes) == 1
        said = [line for line in log.read_text().splitlines() if line.startswith("megamm: ")]
        assert len(said) == 1 and "step_00000009: cannot be written (No space left" in said[0]
        events = (run_dir / "log.txt").read_text()
        assert "warning: no checkpoint was saved, the last good one is step_00000003" in events
        assert len(curve(run_dir)) == 9 and "Traceback" not in log.read_text()
        assert verify(disk / "step_00000003") and [path.name for path in disk.iterdir()] == ["step_00000003"]
