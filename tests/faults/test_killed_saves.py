"""F2: a run that is killed while it saves goes on from the last committed checkpoint, removes what is left of
the other, and ends bitwise equal to one that was never interrupted."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from megamm.engine.manifest import MANIFEST, list_checkpoints, verify
from tests.faults.conftest import FROZEN, OVERRIDES
from tests.faults.killed_saves import COMMITTED, PHASES, TARGET
from tests.training.runs import curve, kill, newest_state, run, start, write_recipe

draw = random.SystemRandom()
LAYOUTS = {"one": (1, ()), "tp2": (2, ("--parallel.tensor=2",)), "dp2": (2, ())}


def killed_and_resumed(recipe: Path, run_dir: Path, phase: str, layout: str, asynchronous: bool) -> None:
    processes, overrides = LAYOUTS[layout]
    # the files of tensors are every rank's, the rest is rank 0's
    rank = draw.randrange(processes) if phase == "shards" else 0
    log = run_dir.parent / "log"
    options = [FROZEN, *OVERRIDES, *overrides, f"--run_dir={run_dir}"]
    options += [f"--checkpoint.asynchronous={str(asynchronous).lower()}"]
    options += ["--checkpoint.keep=1"] if phase == "removal" else []
    process = start(recipe, log, *options, processes=processes, target=TARGET, before=(phase, "2", str(rank)))
    try:
        assert process.wait(150) == -signal.SIGKILL, log.read_text()
    finally:
        kill(process)

    # what is there: the first checkpoint, and the second only if it has its name
    found = list_checkpoints(run_dir / "checkpoints")
    complete = [path for path in found if (path / MANIFEST).exists()]
    steps = {"after_rename": [6, 3], "removal": [6]}.get(phase, [3])
    assert [verify(path, of_a_run=True).step for path in complete] == steps
    left = [path.name for path in (run_dir / "checkpoints").iterdir() if path not in found]
    assert len(left) == (phase not in COMMITTED) and all(name.startswith(".incomplete-") for name in left)

    log.unlink()
    options = [each for each in options if "keep" not in each]
    assert run(recipe, log, *options, processes=processes) == 0, log.read_text()
    assert f"resumed at step {steps[0]}" in log.read_text()
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    # what is half removed goes with the next save
    assert names == {f"step_{step:08d}" for step in (3, 6, 9) if phase != "removal" or step > 3}


def assert_same(one: Path, other: Path) -> None:
    a, b = newest_state(one), newest_state(other)
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert curve(one) == curve(other) and len(curve(one)) == 9


def test_killed_in_one_of_the_phases(trained: Path, tmp_path: Path) -> None:
    phase, asynchronous = draw.choice(list(PHASES)), draw.choice([True, False])
    print(phase, asynchronous)  # shown if it fails
    killed_and_resumed(trained / "recipe.yaml", tmp_path / "run", phase, "one", asynchronous)
    assert_same(trained / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def straight(
    trained: Path, tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path
) -> dict[str, Path]:
    """Finished runs by layout."""
    found = {"one": trained}
    for layout in ("tp2", "dp2"):
        found[layout] = tmp_path_factory.mktemp(layout)
        processes, overrides = LAYOUTS[layout]
        recipe, log = write_recipe(found[layout], dataset_dir, tokenizer_dir), found[layout] / "log"
        done = run(recipe, log, FROZEN, *OVERRIDES, *overrides, processes=processes)
        assert done == 0, log.read_text()
    return found


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_every_phase(
    phase: str, layout: str, asynchronous: bool, straight: dict[str, Path], tmp_path: Path
) -> None:
    folder = straight[layout]
    killed_and_resumed(folder / "recipe.yaml", tmp_path / "run", phase, layout, asynchronous)
    assert_same(folder / "run", tmp_path / "run")
