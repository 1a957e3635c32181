"""SIGTERM and SIGUSR1, to whom a scheduler likes and when: all ranks stop after the same step with one
checkpoint, the exit code says so, and the run goes on bit for bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megamm.engine.manifest import list_checkpoints
from megamm.errors import INTERRUPTED, STOPPED
from megamm.training import stopping
from tests import forks
from tests.faults.launches import LAYOUTS, OURS, PLAIN, Launch
from tests.training.runs import (
    STEPS,
    Ranks,
    assert_same_end,
    curve,
    kill,
    run,
    start,
    wait_for_step,
    write_recipe,
)

NO_SAVES = "--checkpoint.interval=0"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    recipe = write_recipe(folder, dataset_dir, tokenizer_dir)
    assert run(recipe, folder / "log", processes=2) == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.fixture
def recipe(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    return write_recipe(tmp_path, dataset_dir, tokenizer_dir)


@pytest.fixture
def dice() -> random.Random:
    """Other moments in every run of the tests; a failure shows the seed."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


def stopped_step(run_dir: Path) -> int:
    """The step that all ranks stopped after: the last one, and that of the only checkpoint."""
    (checkpoint,) = list_checkpoints(run_dir / "checkpoints")
    step = int(checkpoint.name.removeprefix("step_"))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [checkpoint.name]
    assert curve(run_dir)[-1][0] == step < STEPS
    return step


def assert_goes_on(recipe: Path, folder: Path, uninterrupted: Path) -> None:
    step = stopped_step(folder / "run")
    assert run(recipe, folder / "log", NO_SAVES, processes=2) == 0, (folder / "log").read_text()
    assert f"resumed at step {step} " in (folder / "run" / "log.txt").read_text()
    assert_same_end(uninterrupted, folder / "run")


# --- one signal, and those that follow it -------------------------------------------------------------------


def signals_to_itself(file: str, pauses: list[float], grace_s: float) -> int:
    """In a process of its own: what it has agreed to after signals to itself, each after a pause."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    stopping.GRACE_S = grace_s
    with stopping.StopRequests() as requests:
        requests.listen(torch.device("cpu"))
        assert requests.agreed() == (None, 0)
        for pause, number in zip(pauses, (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1), strict=False):
            time.sleep(pause)
            os.kill(os.getpid(), number)
        Path(file).write_text(str(requests.agreed()[0]))
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher that has seen another rank end
    return 0


@pytest.mark.parametrize(
    ("pauses", "agreed", "code"),
    [([0.0], "SIGUSR1", 0), ([0.0, 0.0, 0.05], "SIGUSR1", 0), ([0.0, 0.0, 1.5], None, -signal.SIGUSR1)],
)
def test_signals_at_once_are_one_request(
    tmp_path: Path, pauses: list[float], agreed: str | None, code: int
) -> None:
    found = tmp_path / "agreed"
    target = "tests.faults.test_signals:signals_to_itself"
    process = forks.start(
        0, target, [str(found), pauses, 1.0], {**os.environ, "OMP_NUM_THREADS": "1"}, tmp_path / "log"
    )
    assert process.wait(60) == code, (tmp_path / "log").read_text()
    assert (found.read_text() if found.exists() else None) == agreed


def test_all_ranks_are_told_twice(
    tmp_path: Path, recipe: Path, uninterrupted: Path, dice: random.Random
) -> None:
    """Both ranks get a signal, a moment later the other one: what Slurm and its tasks make of the end of a
    job."""
    ranks = start(recipe, tmp_path / "log", NO_SAVES, processes=2)
    assert isinstance(ranks, Ranks)
    try:
        wait_for_step(tmp_path / "run", dice.randrange(1, STEPS - 5), ranks)
        for number in dice.sample(SIGNALS, 2):
            for fork in dice.sample(ranks.forks, 2):
                fork.send_signal(number)
        assert [fork.wait(60) for fork in ranks.forks] == [STOPPED, STOPPED], (tmp_path / "log").read_text()
    finally:
        kill(ranks)
    assert_goes_on(recipe, tmp_path, uninterrupted)


# --- launchers ----------------------------------------------------------------------------------------------


def tell(launch: Launch, whom: str, number: int) -> None:
    """A signal for the launcher, a rank ("0", "1"), all ranks, or all processes."""
    ranks = launch.ranks()
    pids = {
        "launcher": [launch.process.pid],
        "ranks": [rank.pid for rank in ranks.values()],
        "all": [launch.process.pid, *(rank.pid for rank in ranks.values())],
    }
    for pid in pids[whom] if whom in pids else [ranks[int(whom)].pid]:
        os.kill(pid, number)


def assert_stops(
    launch: Launch, folder: Path, whom: str, number: int, step: int, code: int, within: float = 60
) -> None:
    launch.wait_for_step(folder / "run", step)
    tell(launch, whom, number)
    assert launch.wait(within) == code, launch.output()[-5000:]
    name = signal.Signals(number).name if number != signal.SIGKILL else "SIGTERM"
    assert f"{name}: stopped after step" in (folder / "run" / "log.txt").read_text()


def test_our_launcher_hands_signals_on(
    tmp_path: Path, recipe: Path, uninterrupted: Path, dice: random.Random
) -> None:
    """Its exit code is the run's, and nothing is started again although it could be."""
    whom, number, step = dice.choice(("launcher", "1")), dice.choice(SIGNALS), dice.randrange(1, STEPS - 5)
    print(whom, number, step)
    with Launch(recipe, tmp_path / "log", NO_SAVES, launcher=OURS) as launch:
        assert_stops(launch, tmp_path, whom, number, step, STOPPED)
    assert "Traceback" not in launch.output() and "starting again" not in launch.output()
    assert_goes_on(recipe, tmp_path, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("whom", ["launcher", "0", "1", "ranks", "all"])
@pytest.mark.parametrize("launcher", [PLAIN, OURS], ids=["plain", "ours"])
def test_every_launcher_and_target(
    tmp_path: Path,
    recipe: Path,
    uninterrupted: Path,
    dice: random.Random,
    launcher: tuple[str, ...],
    whom: str,
    number: int,
) -> None:
    """torchrun itself ends with 1, SIGUSR1 kills it (its ranks save all the same), and it starts a run again
    that was stopped, which then ends the same way at once."""
    step = dice.randrange(1, STEPS - 5)
    code = STOPPED
    if launcher is PLAIN:
        code = -signal.SIGUSR1 if number == signal.SIGUSR1 and whom in ("launcher", "all") else 1
    with Launch(recipe, tmp_path / "log", NO_SAVES, launcher=launcher) as launch:
        launch.wait_for_step(tmp_path / "run", step)
        tell(launch, whom, number)
        assert launch.wait(60) == code, launch.output()[-5000:]
    if launcher is PLAIN and whom in ("0", "1", "ranks"):
        assert f"has ended with exit code {STOPPED}" in launch.output()
    assert_goes_on(recipe, tmp_path, uninterrupted)


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_do_not_outlive_their_launcher(
    tmp_path: Path, recipe: Path, dataset_dir: Path, tokenizer_dir: Path, layout: str
) -> None:
    """kill -9 of torchrun: the ranks save and go within seconds, with their loader processes."""
    more = (*LAYOUTS[layout], "--data.workers=1")
    with Launch(recipe, tmp_path / "log", NO_SAVES, *more) as launch:
        assert_stops(launch, tmp_path, "launcher", signal.SIGKILL, 3, -signal.SIGKILL)
    step = stopped_step(tmp_path / "run")
    (tmp_path / "straight").mkdir()
    other = write_recipe(tmp_path / "straight", dataset_dir, tokenizer_dir)
    for one, folder in ((recipe, tmp_path), (other, tmp_path / "straight")):
        assert run(one, tmp_path / "log", *LAYOUTS[layout], processes=2) == 0, launch.output()
        assert (f"resumed at step {step} " in (folder / "run" / "log.txt").read_text()) == (one is recipe)
    assert_same_end(tmp_path / "straight" / "run", tmp_path / "run")


@pytest.mark.faults
def test_wrong_input_is_not_started_again(tmp_path: Path, recipe: Path) -> None:
    """Under torchrun itself: the sentence once, and each restart says that it is in vain."""
    with Launch(recipe, tmp_path / "log", f"--training.init_from={tmp_path / 'none'}") as launch:
        assert launch.wait(240) == 1
    assert launch.output().count("training.init_from:") - launch.output().count("(training.init_from:") == 1
    assert launch.output().count("this launch has ended with exit code 2") == 3


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [PLAIN, OURS], ids=["plain", "ours"])
@pytest.mark.parametrize("whom", ["launcher", "ranks"])
def test_signals_while_it_starts_saves_and_validates(
    tmp_path: Path,
    recipe: Path,
    dataset_dir: Path,
    uninterrupted: Path,
    dice: random.Random,
    launcher: tuple[str, ...],
    whom: str,
) -> None:
    """At any time from the start on; saving and validating in every step. The state is good, whatever was
    written, and the run goes on from it."""
    options = ("--standalone", "--max-restarts=0")
    busy = (
        "--checkpoint.interval=1",
        "--validation.interval=1",
        f"--validation.data={dataset_dir}",
        "--checkpoint.keep=100",
    )
    for moment in (dice.uniform(0.5, 12) for _ in range(3)):
        print(f"{moment:.2f} s")
        with Launch(recipe, tmp_path / "log", *busy, launcher=launcher, options=options) as launch:
            began = time.monotonic()
            while time.monotonic() - began < moment and launch.process.poll() is None:
                time.sleep(0.01)
            if launch.process.poll() is None and (whom == "launcher" or launch.ranks()):
                tell(launch, whom, signal.SIGTERM)
            launch.wait(90)
            assert "megamm/" not in launch.output(), launch.output()[-3000:]  # no traceback of ours
    assert run(recipe, tmp_path / "log", *busy, processes=2) == 0, launch.output()[-3000:]
    assert_same_end(uninterrupted, tmp_path / "run")


@pytest.mark.faults
def test_a_late_second_signal_ends_at_once(tmp_path: Path, recipe: Path) -> None:
    """In the middle of a step that does not end: the first signal waits for it, one after the grace does
    not. The next start goes on from the last checkpoint."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW_SIXTH_STEP)
    paths = os.pathsep.join([str(tmp_path / "slow"), os.environ.get("PYTHONPATH", "")])
    with Launch(
        recipe, tmp_path / "log", launcher=(), processes=1, variables={"SLOW": "1", "PYTHONPATH": paths}
    ) as launch:
        launch.wait_for_step(tmp_path / "run", 5)
        launch.process.terminate()
        time.sleep(stopping.GRACE_S / 2)
        launch.process.terminate()
        time.sleep(stopping.GRACE_S / 2 + 1)
        assert launch.process.poll() is None
        launch.process.terminate()
        assert launch.wait(10) == -signal.SIGTERM
    assert run(recipe, tmp_path / "log") == 0
    assert "resumed at step 3 " in (tmp_path / "run" / "log.txt").read_text()


SLOW_SIXTH_STEP = """
import sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "megamm.training.train":
            sys.meta_path.remove(self)
            import megamm.training.feed as feed
            ordinary = feed.BatchFeed.next_step
            steps = []
            def next_step(self):
                steps.append(1)
                for _ in range(1000 if len(steps) == 6 else 0):
                    time.sleep(0.1)
                return ordinary(self)
            feed.BatchFeed.next_step = next_step

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [PLAIN, OURS], ids=["plain", "ours"])
def test_ctrl_c(
    tmp_path: Path, recipe: Path, uninterrupted: Path, dice: random.Random, launcher: tuple[str, ...]
) -> None:
    """In a terminal it reaches the launcher alone, as ranks lead sessions of their own. torchrun itself ends
    with 1 and a traceback of its own."""
    step, saved_at_once = dice.randrange(4, STEPS - 4), "--checkpoint.asynchronous=false"
    with Launch(recipe, tmp_path / "log", saved_at_once, launcher=launcher) as launch:
        launch.wait_for_step(tmp_path / "run", step)
        tell(launch, "launcher", signal.SIGINT)
        assert launch.wait(60) == (1 if launcher is PLAIN else INTERRUPTED), launch.output()
    assert "megamm/" not in launch.output(), launch.output()
    assert launcher is PLAIN or "Traceback" not in launch.output()
    assert run(recipe, tmp_path / "log", saved_at_once, processes=2) == 0, launch.output()
    assert "resumed at step " in (tmp_path / "run" / "log.txt").read_text()
    assert_same_end(uninterrupted, tmp_path / "run")
