"""Runs pytest and checks that it leaves no process behind.

    python tests/run_pytest.py ARGS...        ARGS go to pytest; the exit status is pytest's

pytest runs in a session of its own. Everything it starts, however deep and in whatever session, inherits a
variable with a value of this run; what still carries it when pytest has ended was left behind. It is named,
killed, and the run has failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid

import psutil

MARK = "MEGAMM_TEST_RUN"
LEFTOVERS = 86  # the exit status when pytest was content but left processes behind
GRACE_S = 3.0  # a process that is on its way out is no leftover


def main(args: list[str]) -> int:
    """Runs pytest with `args`; returns the exit status."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "pytest", *args]
    pytest = subprocess.Popen(command, env={**os.environ, MARK: mark}, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: os.killpg(pytest.pid, received))
    status = pytest.wait()
    left = _leftovers(mark)
    for process in left:
        print(f"left behind by the tests: {_describe(process)}", file=sys.stderr)
        _kill(process)
    psutil.wait_procs(left, timeout=GRACE_S)
    return LEFTOVERS if left and status == 0 else abs(status)


def _leftovers(mark: str) -> list[psutil.Process]:
    """Processes of this run that do not end by themselves within a moment."""
    deadline = time.monotonic() + GRACE_S
    while True:
        found = [process for process in psutil.process_iter() if _carries(process, mark)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False  # gone meanwhile, or another user's


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
