"""The wrapper around pytest: it passes exit statuses on and finds what tests leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

WRAPPER = Path(__file__).parent / "run_pytest.py"
LEAVE = """
import subprocess, sys
def test_it():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open("child.pid", "w").write(str(child.pid))
"""


def run_wrapper(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_inner.py").write_text(code)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, str(WRAPPER), "-q", "-p", "no:cacheprovider", "test_inner.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("body", "status"), [("pass", 0), ("assert False", 1)])
def test_exit_status_is_that_of_pytest(tmp_path: Path, body: str, status: int) -> None:
    done = run_wrapper(tmp_path, f"def test_it():\n    {body}\n")
    assert done.returncode == status, done.stdout + done.stderr
    assert "1 passed" in done.stdout or "1 failed" in done.stdout


def test_process_that_a_test_leaves_behind_is_named_and_killed(tmp_path: Path) -> None:
    done = run_wrapper(tmp_path, LEAVE)
    pid = int((tmp_path / "child.pid").read_text())
    assert done.returncode == 86, done.stdout + done.stderr
    assert f"left behind by the tests: {pid} " in done.stderr
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
