"""The harness itself: results, failures, hangs and leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import DistributedError, run_distributed


def add_ranks(scale: float) -> dict[str, torch.Tensor | str | None]:
    """All-reduces rank + 1."""
    dist.init_process_group("gloo")
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return {"total": total * scale, "threads": os.environ.get("OMP_NUM_THREADS")}


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


def test_results_of_every_rank_come_back_in_order() -> None:
    results = run_distributed(2, "tests.dist.test_harness:add_ranks", {"scale": 0.5})
    assert [result["total"].item() for result in results] == [1.5, 1.5]
    assert [result["threads"] for result in results] == ["1", "1"]


def test_failing_rank_is_reported_and_the_others_are_killed(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DistributedError, match=r"rank 1 of 2 failed \(exit status 1\)[\s\S]*rank one is out"):
        run_distributed(2, "tests.dist.test_harness:fail_on_rank_one", {"pid_dir": str(tmp_path)})
    assert time.monotonic() - start < 60
    # Rank 0 may be killed while it still imports, before it could write its id.
    _assert_dead(tmp_path, len(list(tmp_path.glob("*.pid"))) or 1)


def test_hanging_ranks_are_killed_when_the_time_is_up(tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match=r"no answer from rank \[0, 1\] of 2 in 12 s[\s\S]*hanging"):
        run_distributed(2, "tests.dist.test_harness:hang", {"pid_dir": str(tmp_path)}, timeout=12)
    _assert_dead(tmp_path, 2)


def test_children_that_outlive_their_rank_are_killed(tmp_path: Path) -> None:
    (pid,) = run_distributed(1, "tests.dist.test_harness:leave_a_child", {"pid_dir": str(tmp_path)})
    assert pid > 0
    _assert_dead(tmp_path, 1)


def test_unknown_function_is_an_error() -> None:
    with pytest.raises(DistributedError, match="no_such_function"):
        run_distributed(1, "tests.dist.test_harness:no_such_function")
