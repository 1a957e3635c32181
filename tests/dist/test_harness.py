"""The harness itself: results, failures, hangs and leftovers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import ROOT, DistributedError, run_distributed

EITHER_WAY = pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])


def add_ranks(scale: float) -> dict[str, torch.Tensor | str | int | None]:
    """All-reduces rank + 1."""
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return {"total": total * scale, "threads": os.environ.get("OMP_NUM_THREADS"), "hash": hash("a name")}


def fail_on_rank_one(pid_dir: str) -> None:
    """Rank 1 raises; the others would wait for ever."""
    _write_pid(pid_dir)
    if os.environ["RANK"] == "1":
        raise RuntimeError("rank one is out")
    time.sleep(600)


def hang(pid_dir: str) -> None:
    """Never returns."""
    _write_pid(pid_dir)
    print("hanging", flush=True)
    time.sleep(600)


def leave_a_child(pid_dir: str) -> int:
    """Returns, but a child of it goes on (and holds the log open)."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (Path(pid_dir) / f"{child.pid}.pid").touch()
    return child.pid


def _write_pid(pid_dir: str) -> None:
    (Path(pid_dir) / f"{os.getpid()}.pid").touch()


def _assert_dead(pid_dir: Path, count: int) -> None:
    pids = [int(path.stem) for path in pid_dir.glob("*.pid")]
    assert len(pids) == count
    deadline = time.monotonic() + 10  # a killed orphan is reaped by init a moment later
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if _alive(pid)]}"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@EITHER_WAY
def test_results_of_every_rank_come_back_in_order(fresh: bool) -> None:
    results = run_distributed(2, "tests.dist.test_harness:add_ranks", {"scale": 0.5}, fresh=fresh)
    assert [result["total"].item() for result in results] == [1.5, 1.5]
    assert [result["threads"] for result in results] == ["1", "1"]
    assert results[0]["hash"] != results[1]["hash"], "ranks may do things in the same order by luck"


@EITHER_WAY
def test_failing_rank_is_reported_and_the_others_are_killed(fresh: bool, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"rank 1 of 2 failed \(exit status 1\)[\s\S]*rank one is out"):
        args = {"pid_dir": str(tmp_path)}
        run_distributed(2, "tests.dist.test_harness:fail_on_rank_one", args, fresh=fresh)
    assert time.monotonic() - start < 60
    # Rank 0 may be killed while it still imports, before it could write its id.
    _assert_dead(tmp_path, len(list(tmp_path.glob("*.pid"))) or 1)


@pytest.mark.parametrize(("fresh", "timeout"), [(False, 3), (True, 12)])
def test_hanging_ranks_are_killed_when_the_time_is_up(fresh: bool, timeout: int, tmp_path: Path) -> None:
    said = rf"no answer from rank \[0, 1\] of 2 in {timeout} s[\s\S]*hanging"
    with pytest.raises(DistributedError, match=said):
        args = {"pid_dir": str(tmp_path)}
        run_distributed(2, "tests.dist.test_harness:hang", args, timeout, fresh)
    _assert_dead(tmp_path, 2)


@EITHER_WAY
def test_children_that_outlive_their_rank_are_killed(fresh: bool, tmp_path: Path) -> None:
    args = {"pid_dir": str(tmp_path)}
    (pid,) = run_distributed(1, "tests.dist.test_harness:leave_a_child", args, fresh=fresh)
    assert pid > 0
    _assert_dead(tmp_path, 1)


def test_unknown_function_is_an_error() -> None:
    with pytest.raises(DistributedError, match="no_such_function"):
        run_distributed(1, "tests.dist.test_harness:no_such_function")


@pytest.mark.parametrize(
    ("number", "last"),
    [
        (signal.SIGTERM, "fork.poll()"),
        # the answer stays unread
        (signal.SIGKILL, 'print(\'{"what": "status", "pid": %d}\' % fork.pid, file=it._stream, flush=True)'),
    ],
    ids=["SIGTERM", "SIGKILL"],
)
def test_no_fork_outlives_the_tests(number: signal.Signals, last: str, tmp_path: Path) -> None:
    """Nor what it started, nor the interpreter that it came from."""
    code = (
        "import os, sys, time; from tests.dist.harness import Path, forks\n"
        "environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'RANK': '0'}\n"
        f"args, log = [{str(tmp_path)!r}], Path({str(tmp_path / 'log')!r})\n"
        "forks.start(0, 'tests.dist.test_harness:leave_a_child', args, environment, log)\n"
        "fork = forks.start(0, 'tests.dist.test_harness:hang', args, environment, log)\n"
        f"it = forks._interpreters[0]; {last}; time.sleep(0.5)\n"
        f"Path({str(tmp_path)!r}, f'{{it._process.pid}}.pid').touch(); time.sleep(600)\n"
    )
    tests = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 3:
        assert time.monotonic() < deadline and tests.poll() is None
        time.sleep(0.05)
    tests.send_signal(number)
    tests.wait(30)
    _assert_dead(tmp_path, 3)
