"""A rank is killed at any moment: torchrun starts the ranks again, and the run ends as if nothing had
happened."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megamm.engine.groups import _ATTEMPT, meet
from megamm.engine.ranks import lost_rank
from megamm.errors import RankLost
from tests.faults.launches import LAYOUTS, OURS, PLAIN, Launch
from tests.training.runs import STEPS, assert_same_end, curve, run, write_recipe

MANY_KILLS = 20


@pytest.fixture
def dice() -> random.Random:
    """Other kills in every run of the tests; a failure shows the seed."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    return random.Random(seed)


def straight(folder: Path, layout: str, dataset: Path, tokenizer: Path) -> Path:
    """Run directory of an uninterrupted run."""
    folder.mkdir()
    recipe = write_recipe(folder, dataset, tokenizer)
    assert run(recipe, folder / "log", *LAYOUTS[layout], processes=2) == 0, (folder / "log").read_text()
    return folder / "run"


def kill_at(launch: Launch, run_dir: Path, step: int, rank: int) -> None:
    """SIGKILL for one rank once `step` is logged, or while it starts again."""
    launch.wait_for_step(run_dir, step)
    while (victim := launch.ranks().get(rank)) is None:
        assert launch.process.poll() is None, launch.output()[-3000:]
    victim.kill()
    psutil.wait_procs([victim], timeout=10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_rank_costs_nothing(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, layout: str, dice: random.Random
) -> None:
    step, rank = dice.randrange(1, STEPS - 3), dice.randrange(2)
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    with Launch(recipe, tmp_path / "log", *LAYOUTS[layout]) as launch:
        kill_at(launch, tmp_path / "run", step, rank)
        assert launch.wait() == 0, launch.output()[-5000:]
    assert "Traceback" not in launch.output()
    samples = [row[1] for row in curve(tmp_path / "run")]
    assert samples == [8 * done for done in range(1, STEPS + 1)]
    assert_same_end(straight(tmp_path / "straight", layout, dataset_dir, tokenizer_dir), tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize("launcher", [PLAIN, OURS], ids=["plain", "ours"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_kills(
    tmp_path: Path,
    dataset_dir: Path,
    tokenizer_dir: Path,
    layout: str,
    launcher: tuple[str, ...],
    dice: random.Random,
) -> None:
    """At any moment: while the ranks start, meet, load, train and save; several ranks at once, too; with
    loader processes, of which none may be left."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    options = ("--standalone", f"--max-restarts={MANY_KILLS}")
    more = (*LAYOUTS[layout], "--checkpoint.interval=1", "--checkpoint.keep=100", "--data.workers=1")
    kills = 0
    with Launch(recipe, tmp_path / "log", *more, launcher=launcher, options=options) as launch:
        launch.wait_for_step(tmp_path / "run", 1)
        while kills < MANY_KILLS // len(LAYOUTS):
            while len(ranks := launch.ranks()) < 2 and launch.process.poll() is None:
                time.sleep(0.02)
            if launch.process.poll() is not None:
                break
            for victim in dice.sample(list(ranks.values()), dice.choice([1, 1, 1, 2])):
                with contextlib.suppress(psutil.NoSuchProcess):  # on its way out, as another one had died
                    victim.kill()
                psutil.wait_procs([victim], timeout=10)
            kills += 1
            moment = time.monotonic() + dice.uniform(0.2, 12)
            while time.monotonic() < moment and launch.process.poll() is None:
                time.sleep(0.02)
        assert launch.wait(200) == 0, launch.output()[-5000:]
    print(f"{kills} kills")
    assert [row[1] for row in curve(tmp_path / "run")] == [8 * done for done in range(1, STEPS + 1)]
    assert_same_end(straight(tmp_path / "straight", layout, dataset_dir, tokenizer_dir), tmp_path / "run")


def meet_in_threads(file: Path, world: int) -> list[str]:
    """What the ranks of one attempt agree on, that come one after the other in any order."""
    words: list[str] = []
    dice = random.SystemRandom()

    def come(rank: int) -> None:
        words.append(meet(dist.FileStore(str(file), world), rank, world, 20))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in dice.sample(range(world), world)]
    for thread in threads:
        thread.start()
        time.sleep(dice.uniform(0, 0.2))
    for thread in threads:
        thread.join()
    return words


def test_ranks_meet_in_spite_of_what_dead_ones_left(tmp_path: Path) -> None:
    """The store of a launch outlives its ranks: an old word of rank 0, old greetings and answers lie in
    it."""
    store = dist.FileStore(str(tmp_path / "store"), 3)
    seen = set()
    for _ in range(4):
        words = meet_in_threads(tmp_path / "store", 3)
        assert len(words) == 3 and len(set(words)) == 1 and words[0] not in seen
        seen.add(words[0])
        # those of an attempt that died half way
        store.set(_ATTEMPT, "an-old-word")
        store.set("megamm/an-old-word/greeting/1", "dead")
        store.set("megamm/an-old-word/answer/dead", "1")


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 3)
    store.set(_ATTEMPT, "an-old-word")
    with pytest.raises(RankLost, match=r"not met within 0.2 s: rank 0 does not answer"):
        meet(store, 1, 3, 0.2)
    with pytest.raises(RankLost, match=r"not met within 0.2 s: rank 1, 2 did not come"):
        meet(store, 0, 3, 0.2)


@pytest.mark.parametrize(
    ("error", "is_loss"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1. GLHF!"), True),
        (
            RuntimeError("[/x/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 6000ms for recv"),
            True,
        ),
        (
            dist.DistBackendError("NCCL error in: x.cpp, remote process exited or there was a network error"),
            True,
        ),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (dist.DistBackendError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_lost_ranks_are_called_so(error: RuntimeError, is_loss: bool) -> None:
    found = lost_rank(error, "after step 7", is_known=False)
    assert (found is not None) == is_loss
    if found is not None:
        assert str(found).startswith("after step 7: another rank has died or does not answer (")
        assert (
            found.exit_code == 69
            and "\n" not in str(found)
            and "GLHF" not in str(found)
            and "/x/" not in str(found)
        )
