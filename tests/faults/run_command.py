"""A subcommand as a process of its own that may not take long nor much memory, and what became of it."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil

from tests import forks
from tests.training.runs import ROOT, kill, megamm

TIMEOUT_S = 60.0
MEMORY = 8 << 30  # bytes of address space above what the interpreter has
CAPABILITY_VERSION = 0x20080522  # linux/capability.h


class Outcome(NamedTuple):
    """Exit status ("hang" if there was none in time), what was printed, and the sentences among it."""

    code: int | str
    text: str
    said: list[str]


def run_command(
    line: list[str], log: Path, timeout: float = TIMEOUT_S, unprivileged: bool = False
) -> Outcome:
    """Run `megamm` with the arguments `line`.

    Args:
        log: is overwritten with what it prints.
        unprivileged: even root is concerned by permissions.
    """
    log.write_bytes(b"")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    target = f"tests.faults.run_command:{'_unprivileged' if unprivileged else '_bounded'}"
    process = forks.start(0, target, line, env, log)
    code: int | str
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = "hang"
    finally:
        kill(process)
    text = log.read_text(errors="replace")
    return Outcome(code, text, [one for one in text.splitlines() if one.startswith("megamm: ")])


def _bounded(*arguments: str) -> int:
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return megamm(*arguments)


def _unprivileged(*arguments: str) -> int:
    give_up_privileges()
    return _bounded(*arguments)


def give_up_privileges() -> None:
    """Let file permissions concern this process, even if it is root's."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
