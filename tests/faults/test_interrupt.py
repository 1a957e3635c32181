"""Ctrl-C in the middle of every subcommand (F14): exit code 130, no traceback, nothing left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.commands import COMMANDS, Ground, words
from tests.training.runs import ROOT

START_TICKS = 25  # Python and the command line itself take half of it
ENDS_IN = 60.0  # seconds; an import has to be through first
FINAL = {"data", "tokenizer", "list.jsonl", "plot.svg", "page.html", "imported", "hf", "report.html"}
FINAL |= {"predictions.jsonl"}  # what stands in Ground.out only when a command is through


def interrupted(name: str, ground: Ground, log: Path, draw: random.Random) -> bool:
    """Interrupt the command at a random time; whether it had not ended by then."""
    command = [sys.executable, "-m", "megamm", *words(name, ground)[0]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=env, cwd=ROOT, start_new_session=True
        )
    children: list[psutil.Process] = []
    try:
        while not has_begun(process.pid):  # Python itself prints a traceback while it starts
            time.sleep(0.01)
        time.sleep(draw.choice([0.2, 1, 4]) * draw.random())
        if process.poll() is not None:
            return False
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(ENDS_IN)
    finally:
        process.kill()
        process.wait()
    text = log.read_text(errors="replace")
    _gone, alive = psutil.wait_procs(children, 10)
    assert not alive, f"{alive} were left by {name}"
    assert "Traceback" not in text, text
    if code in (0, -signal.SIGINT):  # it was through, and Python on its way out
        return False
    assert code == 130 and text.splitlines()[-1] == "megamm: interrupted", f"{code}: {text}"
    assert not FINAL & {path.name for path in ground.out.iterdir()}, list(ground.out.iterdir())
    return True


def has_begun(pid: int) -> bool:
    """Whether Python has started, told by the time that it has used, and runs our code (or has ended)."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    used = int(fields[11]) + int(fields[12])  # clock ticks, of 10 ms
    return used >= START_TICKS or fields[0] == b"Z"


def check(name: str, count: int, ground: Ground, folder: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for number in range(count):
        interrupted(name, ground, folder / str(number), draw)
        shutil.rmtree(ground.out)
        ground.out.mkdir()


def test_of_some_command(ground: Ground, tmp_path: Path) -> None:
    check(random.SystemRandom().choice(list(COMMANDS)), 1, ground, tmp_path)


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", COMMANDS)
def test_of_every_command(name: str, ground: Ground, tmp_path: Path) -> None:
    check(name, 8, ground, tmp_path)
