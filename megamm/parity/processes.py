"""Starts a function in several processes of this machine, as torchrun would, and never leaves one behind.

Output goes to files and not to pipes: a process that outlives a crashed rank (megatron-core's checkpoint
writer starts one) would keep a pipe open and the caller waiting. Each rank leads a session of its own, so
that such leftovers can be found and killed by their process group; and each rank ends itself when its
caller is gone, however that was ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megamm.errors import RunError

_TAIL = 4000  # characters of a failed rank's output that are shown


class RankFailure(RunError):
    """A rank failed or did not finish in time; the message holds the last lines of its output."""


class Rank(Protocol):
    """A process that leads a session of its own."""

    @property
    def pid(self) -> int:
        """Its id, and that of its group."""

    def exit_status(self) -> int | None:
        """The exit status (of a signal: its negative), or None while it runs. Leaves the zombie: its id then
        stays that of the group."""

    def reap(self) -> None:
        """Wait for its end, by which its id becomes free."""


# (rank, arguments of run_rank, whole environment, log) -> the process
Start = Callable[[int, list[str], dict[str, str], Path], Rank]


def run_processes(
    world_size: int,
    target: str,
    args: Mapping[str, Any],
    work: Path,
    timeout: float,
    env: Mapping[str, str] | None = None,
    start: Start | None = None,
) -> list[Path]:
    """Call `target` in `world_size` processes that find each other through torchrun's environment.

    Args:
        target: "module:function".
        args: keyword arguments of the function; must survive JSON.
        work: an existing directory of the caller's, for output and results.
        timeout: seconds until all ranks are killed.
        env: further environment variables; OMP_NUM_THREADS is 1 unless given here.
        start: starts the process of a rank; None: a new Python interpreter.
    Returns:
        For each rank the file that torch.save made of what the function returned.
    Raises:
        RankFailure: a rank exited with an error, or the time was up. No process is left either way.
    """
    (work / "args.json").write_text(json.dumps(dict(args)))
    ranks: list[Rank] = []
    try:
        port = str(free_port())
        for rank in range(world_size):
            environment = {**os.environ, **torchrun_environment(rank, world_size, port), **(env or {})}
            arguments = [target, str(work / "args.json"), str(_result(work, rank))]
            ranks.append((start or Interpreter)(rank, arguments, environment, _log(work, rank)))
        _wait(ranks, work, target, timeout)
    finally:
        _kill_groups(ranks)
    return [_result(work, rank) for rank in range(world_size)]


def free_port() -> int:
    """A TCP port that is free on the loopback interface right now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Interpreter:
    """A rank in a new Python interpreter."""

    def __init__(self, rank: int, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        with open(log, "wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megamm.parity.processes", *arguments],
                env=environment,
                stdin=subprocess.PIPE,  # closed when this process ends: see _end_with_caller
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """See Rank."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """See Rank."""
        info = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status

    def reap(self) -> None:
        """See Rank."""
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def torchrun_environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    """The variables that torchrun sets, for a rank of `world_size` on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }


def _wait(ranks: list[Rank], work: Path, target: str, timeout: float) -> None:
    """Returns when every rank has finished well; raises at the first failure or when the time is up."""
    deadline = time.monotonic() + timeout
    running = dict(enumerate(ranks))
    while running:
        for rank, process in list(running.items()):
            status = process.exit_status()
            if status is None:
                continue
            if status != 0:
                raise RankFailure(
                    f"{target}: rank {rank} of {len(ranks)} failed ({_describe(status)})\n{_tail(work, rank)}"
                )
            del running[rank]
        if running and time.monotonic() > deadline:
            tails = "\n".join(f"rank {rank}:\n{_tail(work, rank)}" for rank in sorted(running))
            raise RankFailure(
                f"{target}: no answer from rank {sorted(running)} of {len(ranks)} in {timeout:g} s\n{tails}"
            )
        time.sleep(0.02)


def _kill_groups(ranks: list[Rank]) -> None:
    """Kills every process of the ranks' groups (the ranks and what they left) and reaps the ranks."""
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.reap()


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _tail(work: Path, rank: int) -> str:
    return _log(work, rank).read_text(errors="replace")[-_TAIL:]


def _log(work: Path, rank: int) -> Path:
    return work / f"rank{rank}.log"


def _result(work: Path, rank: int) -> Path:
    return work / f"rank{rank}.pt"


# --- what each started process does ---------------------------------------------------------------------


def _end_with_caller() -> None:
    """Kill this process and its children as soon as the one that started it has ended, by whatever signal."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: returns when the other end is closed
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_rank(target: str, args_file: str, result_file: str) -> None:
    """Call "module:function" with the arguments of a file; what it returns goes to another."""
    _end_with_caller()
    import torch

    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(Path(args_file).read_text()))
    torch.save(result, result_file)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
