"""Runs under a real launcher, with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

from megamm.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
MARK = "MEGAMM_TEST_LAUNCH"  # what a launch starts inherits it, however deep
PLAIN = ("-m", "torch.distributed.run")
OURS = (str(ROOT / "examples" / "cluster" / "torchrun.py"),)
LAYOUTS = {"dp2": [], "tp2": ["--parallel.tensor=2"], "pp2": ["--parallel.pipeline=2"]}
FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Launch:
    """`LAUNCHER --nproc-per-node 2 -m megamm train RECIPE ...`; ends with the context, and with it whatever
    it started. No launcher: one process.

    Args:
        log: gets the output of all processes.
        launcher: arguments of Python.
        options: of the launcher.
    """

    def __init__(
        self,
        recipe: Path,
        log: Path,
        *overrides: str,
        launcher: tuple[str, ...] = PLAIN,
        options: tuple[str, ...] = ("--standalone", "--max-restarts=3"),
        processes: int = 2,
        variables: dict[str, str] | None = None,
    ) -> None:
        self.log, self._mark = log, uuid.uuid4().hex
        start = [*launcher, *options, f"--nproc-per-node={processes}"] if launcher else []
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: self._mark}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *start, "-m", "megamm", "train", str(recipe), *overrides],
                env=environment | (variables or {}),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)

    def alive(self) -> list[psutil.Process]:
        """All processes of the launch that have not ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks that run now."""
        found = {}
        for process in self.alive():
            with contextlib.suppress(psutil.Error, OSError):
                if "RANK" in (variables := process.environ()) and "train" in process.cmdline():
                    found[int(variables["RANK"])] = process
        return found

    def wait(self, timeout: float = 120) -> int:
        """The launcher's exit code; all it started must be gone a moment later."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout} s; {self.output()[-3000:]}") from None
        self.assert_nothing_left()
        return code

    def assert_nothing_left(self, within: float = 10) -> None:
        """No process of the launch lives on."""
        deadline = time.monotonic() + within
        while left := self.alive():
            assert time.monotonic() < deadline, [process.cmdline()[:6] for process in left]
            time.sleep(0.1)

    def output(self) -> str:
        """What the processes have said."""
        return self.log.read_text(errors="replace")

    def wait_for_step(self, run_dir: Path, step: int, timeout: float = 100) -> None:
        """Until the run has logged `step`."""
        deadline = time.monotonic() + timeout
        while not any(row["step"] >= step for row in read_metrics(run_dir / "metrics.jsonl")):
            assert self.process.poll() is None, f"ended early: {self.output()[-3000:]}"
            assert time.monotonic() < deadline, f"step {step} was not reached; {self.output()[-3000:]}"
            time.sleep(0.01)
