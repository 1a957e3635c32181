"""F7: a rank that is stopped, hangs or is slow is named, with stacks of all ranks, and nothing else ever
is."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamm.errors import RankLost
from megamm.training.watchdog.beat import Alarm, Beat
from megamm.training.watchdog.slow_ranks import _outlier
from megamm.training.watchdog.verdict import judge
from megamm.training.watchdog.watchdog import INTERVAL_S, Awake, Watchdog
from megamm.training.watchdog.whereabouts import Whereabouts
from tests.faults.inject import fault
from tests.faults.launches import LAYOUTS as LAUNCHED
from tests.faults.launches import Launch
from tests.faults.test_anomalies import incidents
from tests.training.runs import STEPS, Ranks, assert_same_end, kill, run, start, wait_for_step, write_recipe

LAYOUTS = ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.tensor=1"]
LONG = ["--training.steps=100000", "--checkpoint.interval=100"]


@pytest.fixture
def recipe(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    return write_recipe(tmp_path, dataset_dir, tokenizer_dir)


# --- who is to blame ------------------------------------------------------------------------------------


def beat(rank: int, step: int = 7, **more: object) -> Beat:
    return Beat(rank, f"node{rank // 2}", 100 + rank, rank - rank % 2, step=step, phase="update", **more)  # type: ignore[arg-type]


def test_the_silent_are_to_blame_and_their_samples_are_named() -> None:
    last = {
        0: beat(0, samples=[[5, 6], [7]]),
        1: beat(1, 3, code="f (megamm/x.py:1)"),
        2: beat(2),
        3: beat(3),
    }
    answers = {rank: last[rank] for rank in (0, 2, 3)}
    verdict = judge(Alarm(0, 1, 31.0, "x"), last, answers)
    assert (verdict.step, verdict.ranks) == (7, [1])
    assert verdict.sentence == (
        "step 7: rank 1 (process 101 on node0) has given no sign of life for 31 s, last seen in update of "
        "step 3: f (megamm/x.py:1); samples 5, 6, 7"
    )
    exact = {**last, 1: beat(1, 6, is_exact=True)}
    assert judge(Alarm(0, 1, 31.0, "x"), exact, answers).sentence.startswith(
        "step 6: rank 1 (process 101 on node0) has "
    )
    gone = {**last, 1: beat(1, has_left=True)}
    assert judge(Alarm(2, None, 60.0, "x"), gone, answers).ranks != [1], "it has ended in order"


def test_those_who_wait_for_nobody_are_to_blame() -> None:
    waiting = {rank: beat(rank, is_waiting=True, seconds=60.0) for rank in (0, 1, 3)}
    answers = {**waiting, 2: beat(2, code="loop (megamm/y.py:3)", seconds=61.0)}
    verdict = judge(Alarm(2, None, 61.0, "x"), answers, answers)
    assert verdict.ranks == [2]
    assert "rank 2 (process 102 on node1) has got no further for 61 s" in verdict.sentence
    # all wait: who is the farthest behind has not come to where the others are
    behind = {**waiting, 2: beat(2, 6, is_waiting=True)}
    assert judge(Alarm(0, None, 61.0, "x"), behind, behind).ranks == [2]


def test_time_in_which_the_watcher_itself_slept_does_not_count() -> None:
    awake = Awake()
    assert [awake.see(1, INTERVAL_S) for _ in range(3)] == [0.0, INTERVAL_S, 2 * INTERVAL_S]
    assert awake.see(1, 3600.0) == 5 * INTERVAL_S
    assert awake.see(2, 3600.0) == 0.0


def test_what_takes_long_around_steps_gets_further() -> None:
    """A loop of many calls does, one call does not; within a step only what the loop notes counts."""
    here, ended = Whereabouts(), threading.Event()

    def most_often_during(work: Callable[[], object]) -> float:
        """The share of looks at the work that found the most frequent mark."""
        marks: list[object] = []

        def look() -> None:
            time.sleep(0.2)  # until the work has begun
            for _ in range(40):
                marks.append(here.mark())
                time.sleep(0.005)
            ended.set()

        ended.clear()
        thread = threading.Thread(target=look)
        thread.start()
        work()
        thread.join()
        return Counter(marks).most_common(1)[0][1] / len(marks)

    def many_calls() -> None:
        while not ended.is_set():
            sorted(range(random.randint(1, 2000)), key=lambda n: -n)

    here.at("validation")
    assert most_often_during(many_calls) < 0.9 < most_often_during(lambda: ended.wait(60))
    here.at("update")
    assert most_often_during(many_calls) == 1


@pytest.mark.parametrize(
    "seconds, stages, slow",
    [
        ([1.0, 10.0], [0, 0], 1),
        ([1.0, 2.9], [0, 0], None),
        ([9.0, 1.0, 9.5, 1.1], [0, 1, 0, 1], None),  # stages differ, and ranks of one do not
        ([9.0, 1.0, 9.5, 4.0], [0, 1, 0, 1], 3),
        ([1.0, 1.0, 9.5, 1.0], [0, 1, 2, 3], 2),
        ([5.0], [0], None),
    ],
)
def test_slow_is_who_works_longer_than_others_in_its_place(
    seconds: list[float], stages: list[int], slow: int | None
) -> None:
    found = _outlier(seconds, stages, 3.0)
    assert (found and found.rank) == slow


# --- runs -----------------------------------------------------------------------------------------------


def stopped(
    recipe: Path, log: Path, rank: int, layout: str, sig: int = signal.SIGSTOP
) -> tuple[Ranks, float]:
    """A run of two ranks, one of which is stopped at a random moment behind the third step; and when."""
    process = start(recipe, log, *LONG, layout, "--watchdog.silent_s=4", processes=2)
    assert isinstance(process, Ranks)
    try:
        wait_for_step(recipe.parent / "run", 3, process)
        time.sleep(random.SystemRandom().uniform(0, 1))
        os.kill(process.pids[rank], sig)
    except BaseException:
        kill(process)
        raise
    return process, time.monotonic()


def assert_named(run_dir: Path, log: Path, rank: int) -> str:
    """One sentence that names the rank, with the stacks of both; returns the sentence."""
    said = [line for line in log.read_text().splitlines() if line.startswith("megamm: ")]
    assert len(said) == 1, log.read_text()
    assert f": rank {rank} (process " in said[0] and f"rank {1 - rank} (" not in said[0]
    (incident,) = incidents(run_dir)
    assert incident["kind"] == "hang" and incident["ranks"] == [rank]
    (folder,) = (run_dir / "hangs").iterdir()
    texts = [path.read_text() for path in sorted(folder.iterdir())]
    assert len(texts) == 2 and all("most recent call first" in text for text in texts)
    assert f"step {incident['step']}," in texts[rank].splitlines()[0], "the step in which it stopped"
    return said[0]


@pytest.mark.parametrize(
    "rank, layout", [(1, LAYOUTS[0]), (0, LAYOUTS[2])], ids=["tp2", "keeper_of_the_store"]
)
def test_a_stopped_rank_is_named_and_all_end(rank: int, layout: str, tmp_path: Path, recipe: Path) -> None:
    process, since = stopped(recipe, tmp_path / "log", rank, layout)
    try:
        process.wait(60)
        codes = [fork.wait(30) for fork in process.forks]
    finally:
        kill(process)
    assert time.monotonic() - since < 45
    assert codes[1 - rank] == RankLost.exit_code and codes[rank] in (-signal.SIGKILL, RankLost.exit_code)
    sentence = assert_named(tmp_path / "run", tmp_path / "log", rank)
    # (a rank that has only begun a step does not know its samples yet)
    assert "samples " in sentence or rank == 0 or ", in data of step " in sentence
    assert run(recipe, tmp_path / "log", "--training.steps=4", layout, processes=2) in (0, 2)


class Silence:
    """A board on which the other rank has left nothing."""

    def get(self, rank: int) -> None:
        return None

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        return alarm


def test_a_rank_that_stops_before_its_first_sign_of_life_is_silent() -> None:
    watchdog: Any = object.__new__(Watchdog)
    settings = SimpleNamespace(silent_s=4.0, stuck_s=100.0)
    watchdog._recipe = SimpleNamespace(watchdog=settings, parallel=SimpleNamespace(timeout_s=600))
    watchdog._here = SimpleNamespace(mark=lambda: 0, longest_step=None, phase="data")
    watchdog._rank, watchdog._size, watchdog._board = 0, 2, Silence()
    watchdog._everyone = [Beat(rank, "here", 1 + rank, 0) for rank in range(2)]
    watchdog._stuck, watchdog._silent = Awake(), Awake()
    alarms = [watchdog._own_alarm(1.0) for _ in range(7)]
    assert alarms[:5] == [None] * 5 and alarms[6].silent == 1


@pytest.mark.faults
def test_a_rank_that_stops_at_once_is_named(tmp_path: Path, recipe: Path) -> None:
    """In the first second, before it has told anybody that it lives."""
    process = start(recipe, tmp_path / "log", *LONG, LAYOUTS[0], "--watchdog.silent_s=4", processes=2)
    assert isinstance(process, Ranks)
    try:
        wait_for_step(tmp_path / "run", 1, process)
        os.kill(process.pids[1], signal.SIGSTOP)
        process.wait(60)
        codes = [fork.wait(30) for fork in process.forks]
    finally:
        kill(process)
    assert codes[0] == RankLost.exit_code
    assert_named(tmp_path / "run", tmp_path / "log", 1)


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named_in_every_layout(
    rank: int, layout: str, tmp_path: Path, recipe: Path
) -> None:
    test_a_stopped_rank_is_named_and_all_end(rank, layout, tmp_path, recipe)


def test_a_rank_that_lives_and_hangs_is_named(tmp_path: Path, recipe: Path) -> None:
    rank, step = random.SystemRandom().randint(0, 1), random.SystemRandom().randint(2, 6)
    settings = ["--watchdog.stuck_s=4", random.SystemRandom().choice(LAYOUTS)]
    process = start(
        recipe, tmp_path / "log", *LONG, *settings, processes=2, **fault("hang", [step], rank=rank)
    )
    assert isinstance(process, Ranks)
    try:
        process.wait(60)
    finally:
        kill(process)
    sentence = assert_named(tmp_path / "run", tmp_path / "log", rank)
    assert f"step {step}: " in sentence
    assert (
        "forward and backward of micro-batch" in sentence
        and "train_step (megamm/training/loop.py" in sentence
    )


def test_a_run_that_hangs_on_its_own_is_ended(tmp_path: Path, recipe: Path) -> None:
    log = tmp_path / "log"
    assert (
        run(recipe, log, *LONG, "--watchdog.stuck_s=2", **fault("hang", [3]), timeout=60)
        == RankLost.exit_code
    )
    assert "step 3: rank 0 (process " in log.read_text() and "samples " in log.read_text()


def test_a_slow_rank_is_named_and_goes_on(tmp_path: Path, recipe: Path) -> None:
    """It runs for a tenth of the time."""
    slow, ended = random.SystemRandom().randint(0, 1), threading.Event()
    log = tmp_path / "log"
    process = start(recipe, log, "--training.steps=100000", "--checkpoint.interval=0", processes=2)
    assert isinstance(process, Ranks)

    def slow_down() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not ended.wait(0.02):
                os.kill(process.pids[slow], signal.SIGSTOP)
                time.sleep(0.18)
                os.kill(process.pids[slow], signal.SIGCONT)

    thread = threading.Thread(target=slow_down)
    try:
        wait_for_step(tmp_path / "run", 20, process)
        thread.start()
        deadline = time.monotonic() + 90
        while not incidents(tmp_path / "run"):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()
            time.sleep(0.1)
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
        kill(process)
    assert [row["kind"] for row in incidents(tmp_path / "run")][:1] == ["slow_rank"]
    assert f"rank {slow} is slow: " in (tmp_path / "log").read_text()
    assert "has given no sign of life" not in (tmp_path / "log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_false_alarm(layout: str, tmp_path: Path, recipe: Path) -> None:
    settings = ["--training.steps=250", "--checkpoint.interval=20", "--watchdog.silent_s=4", layout]
    assert run(recipe, tmp_path / "log", *settings, processes=2, timeout=280) == 0, (
        tmp_path / "log"
    ).read_text()
    assert incidents(tmp_path / "run") == [] and not (tmp_path / "run" / "hangs").exists()


@pytest.mark.faults
@pytest.mark.parametrize("layout", LAUNCHED)
def test_a_stopped_rank_is_started_again(
    layout: str, tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, recipe: Path
) -> None:
    """By torchrun, with the watchdog's own patience: within 90 seconds, and with the same end."""
    whole = tmp_path / "whole"
    whole.mkdir()
    same = write_recipe(whole, dataset_dir, tokenizer_dir)
    assert run(same, whole / "log", *LAUNCHED[layout], processes=2) == 0, (whole / "log").read_text()
    draw = random.SystemRandom()
    with Launch(recipe, tmp_path / "log", *LAUNCHED[layout]) as launch:
        launch.wait_for_step(tmp_path / "run", draw.randint(4, STEPS - 3))
        os.kill(launch.ranks()[draw.randint(0, 1)].pid, signal.SIGSTOP)
        stopped_at = time.monotonic()
        while "resumed at step" not in launch.output():
            assert time.monotonic() - stopped_at < 90 and launch.process.poll() is None, launch.output()
            time.sleep(0.1)
        print(f"started again after {time.monotonic() - stopped_at:.0f} s")
        assert launch.wait(120) == 0, launch.output()[-5000:]
    assert [incident["kind"] for incident in incidents(tmp_path / "run")] == ["hang"]
    assert_same_end(whole / "run", tmp_path / "run")
