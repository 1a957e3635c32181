"""Two runs in one directory: the second is refused at once and told who is there; a killed run keeps nobody
out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megamm.cli import main
from megamm.errors import InputError
from megamm.training import run_lock
from megamm.training.run_lock import Owner, RunLock
from tests import forks
from tests.faults.launches import Launch
from tests.training.runs import Ranks, assert_same_end, kill, run, start, wait_for_step, write_recipe

LONG = "--training.steps=100000"


@pytest.fixture
def one_rank() -> object:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hold(run_dir: str, owner: dict[str, object], seconds: float) -> int:
    """In a process of its own: the lock of a directory, with another owner's name in it, for some seconds."""
    file = (Path(run_dir) / run_lock.FILE).open("a+")
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.write(json.dumps(owner))
    file.flush()
    (Path(run_dir) / "held").touch()
    time.sleep(seconds)
    return 0


def held(folder: Path, seconds: float, **owner: object) -> forks.Fork:
    """A process that has the lock of `folder`."""
    here = {"host": socket.gethostname(), "pid": os.getpid(), "user": "ada", "since": "2026-01-01 00:00:00"}
    process = forks.start(
        0,
        "tests.faults.test_lock:hold",
        [str(folder), {**here, **owner}, seconds],  # type: ignore[list-item]
        {**os.environ, "OMP_NUM_THREADS": "1"},
        folder / "log",
    )
    while not (folder / "held").exists():
        assert process.poll() is None, (folder / "log").read_text()
        time.sleep(0.01)
    return process


def test_the_second_run_is_refused_and_the_first_goes_on(
    tmp_path: Path,
    dataset_dir: Path,
    tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also with more ranks, all of which end; commands that only read are not hindered. The first is killed,
    and the next start takes its place at once."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    first = start(recipe, tmp_path / "log", LONG, "--checkpoint.keep=1000000")
    second = None
    try:
        wait_for_step(tmp_path / "run", 4, first)
        second = start(recipe, tmp_path / "second", LONG, processes=2)
        assert isinstance(second, Ranks)
        assert [fork.wait(60) for fork in second.forks] == [2, 2]
        owner = json.loads((tmp_path / "run" / "lock").read_text())
        assert owner["pid"] == first.pid and owner["host"] == socket.gethostname()
        sentence = (
            f"run_dir: {tmp_path / 'run'} is in use by another run: process {first.pid} of {owner['user']} on"
        )
        assert sentence in (tmp_path / "second").read_text()
        assert f"(kill {first.pid})" in (tmp_path / "second").read_text()
        assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html")]) == 0
        assert main(["verify", str(tmp_path / "run")]) == 0
        assert first.poll() is None
    finally:
        for process in filter(None, (first, second)):
            kill(process)
    capsys.readouterr()
    assert (tmp_path / "run" / "lock").exists()
    assert run(recipe, tmp_path / "third", "--training.steps=4", "--resume.enabled=false") == 2
    assert "has checkpoints of an earlier run" in (tmp_path / "third").read_text()


@pytest.mark.parametrize(
    "owner",
    [{"host": "node7"}, {"host": "node7", "slurm_job": "4711"}, {"launch": "another"}],
    ids=["other-host", "slurm", "other-launch"],
)
def test_who_runs_is_not_waited_for(
    tmp_path: Path, owner: dict[str, str], one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    process = held(tmp_path, 60, **owner)
    began = time.monotonic()
    try:
        with pytest.raises(InputError, match=r"in use by another run: process \d+ of ada on") as refused:
            RunLock(tmp_path, print)
    finally:
        kill(process)
    assert time.monotonic() - began < run_lock.PATIENCE_S / 2
    remedy = "scancel 4711" if "slurm_job" in owner else f"kill {os.getpid()}"
    assert remedy in str(refused.value) and owner.get("host", socket.gethostname()) in str(refused.value)


@pytest.mark.parametrize(
    "owner", [{"launch": "mine", "host": "node7"}, {"pid": 2**22 + 1}], ids=["launch", "dead"]
)
def test_who_is_on_the_way_out_is_waited_for(
    tmp_path: Path, owner: dict[str, object], one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that was killed a moment ago, but is not gone yet."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    process = held(tmp_path, 1.5, **owner)
    try:
        with RunLock(tmp_path, print):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
            assert process.wait(10) == 0
    finally:
        kill(process)


@pytest.mark.parametrize("left", ["", "{", '{"host": "node7", "pid": 1}', "[]", "null", "\\0" * 4096])
def test_what_lies_in_the_file_is_no_lock(tmp_path: Path, left: str, one_rank: object) -> None:
    (tmp_path / "lock").write_text(left)
    for _ in range(2):  # and it is given back
        with RunLock(tmp_path, pytest.fail):
            owner = Owner(**json.loads((tmp_path / "lock").read_text()))
            assert owner.pid == os.getpid()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, number: int, one_rank: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    said: list[str] = []
    with RunLock(tmp_path, said.append):
        pass
    assert len(said) == 1 and "cannot be locked here" in said[0] and os.strerror(number) in said[0]


def test_children_do_not_keep_the_lock(tmp_path: Path, one_rank: object) -> None:
    """Neither a fork nor what it executes: a loader process may outlive a killed rank by a moment."""
    with RunLock(tmp_path, pytest.fail):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        with RunLock(tmp_path, pytest.fail):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.faults
def test_starts_in_one_moment_leave_one_run(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    """Three launches of two ranks start at about the same time: one trains to its end, the others are
    refused on both ranks."""
    dice = random.SystemRandom()
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    launches = []
    try:
        for number in range(3):
            launches.append(
                Launch(recipe, tmp_path / f"log{number}", "--training.steps=400", "--checkpoint.interval=0")
            )
            time.sleep(dice.uniform(0, 0.5))
        codes = [launch.wait(200) for launch in launches]
    finally:
        for launch in launches:
            launch.__exit__()
    assert sorted(codes) == [0, 1, 1]
    for launch, code in zip(launches, codes, strict=True):
        assert (code == 0) or launch.output().count("megamm: run_dir:") == 1
        assert "/megamm/training/" not in launch.output()  # no traceback but torchrun's


@pytest.mark.faults
def test_a_killed_launch_keeps_nobody_out(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    """Everything is killed at once, loader processes included, and the same command is given in the same
    moment."""
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    (tmp_path / "straight").mkdir()
    other = write_recipe(tmp_path / "straight", dataset_dir, tokenizer_dir)
    assert run(other, tmp_path / "log", processes=2) == 0
    with Launch(recipe, tmp_path / "log", "--data.workers=2") as launch:
        launch.wait_for_step(tmp_path / "run", 4)
        for process in launch.alive():
            process.kill()
    with Launch(recipe, tmp_path / "log", "--data.workers=2") as launch:
        assert launch.wait() == 0, launch.output()[-3000:]
    assert_same_end(tmp_path / "straight" / "run", tmp_path / "run")
