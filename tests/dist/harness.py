"""Runs a function in several processes, as torchrun would, and never leaves one behind.

    results = run_distributed(2, "tests.dist.test_x:worker", {"tensor": 2})

starts two processes with torchrun's environment; each imports `tests.dist.test_x` and calls
`worker(tensor=2)`. What the ranks return comes back as a list, in rank order. The processes are those of
`megamm.parity.processes`, forked from interpreters that have imported everything (tests/forks.py).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamm.parity.processes import Interpreter, Rank, RankFailure, free_port, run_processes
from tests import forks

__all__ = ["ROOT", "DistributedError", "fork_rank", "free_port", "run_distributed"]

ROOT = Path(__file__).resolve().parents[2]


class DistributedError(AssertionError):
    """A rank failed or did not finish in time; the message holds the tail of the first failed rank's log."""


def run_distributed(
    world_size: int,
    target: str,
    args: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
    fresh: bool = False,
) -> list[Any]:
    """Calls `target` in `world_size` processes and returns what each rank returned.

    Args:
        world_size: number of processes (all on this machine).
        target: "module:function", importable from the root of the repository.
        args: keyword arguments of the function; must survive JSON.
        timeout: seconds until all ranks are killed.
        fresh: start new interpreters instead of forks.

    Returns:
        One result per rank. Anything torch.save can write.

    Raises:
        DistributedError: a rank exited with an error, or the time was up.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    start = None if fresh else fork_rank
    if not fresh and forks.possible({"OMP_NUM_THREADS": "1"}):
        forks.warm(world_size)
    with tempfile.TemporaryDirectory(prefix="megamm_dist_") as folder:
        work = Path(folder)
        try:
            files = run_processes(world_size, target, args or {}, work, timeout, {"PYTHONPATH": path}, start)
        except RankFailure as error:
            raise DistributedError(str(error)) from None
        return [torch.load(file, weights_only=False) for file in files]


def fork_rank(rank: int, arguments: list[str], environment: dict[str, str], log: Path) -> Rank:
    """What `run_processes` starts a rank with."""
    if not forks.possible(environment):
        return Interpreter(rank, arguments, environment, log)
    return forks.start(rank, "megamm.parity.processes:run_rank", arguments, environment, log)
