"""Processes that start at once: forks of interpreters that have imported torch, megatron and megamm already.

    process = start(0, "megamm.parity.processes:run_rank", [...], os.environ, log)

Importing takes four seconds of a core, and the tests start some hundred processes that train for less. So an
interpreter that does nothing but import them is kept, in which no thread runs and no group exists, and every
process is a fork of it: with an environment, a session and a log of its own, it calls the target, and ends
as an interpreter does. Interpreters hash strings differently, and ranks that therefore do things in another
order are what tests must find: even and odd ranks come from two interpreters.

Nothing outlives the process that asked: its end closes a socket, upon which the interpreter kills what it
has forked, and ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
INTERPRETERS = 2
WARM = (
    "megamm.cli.entry",
    "megamm.parity.processes",
    "megamm.training.train",
    "tests.dist.stage_workers",
    "tests.dist.workers",
    "tests.training.runs",
    "torch.distributed.checkpoint",
)


class Interpreter:
    """A warmed interpreter, from the side of the tests."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the interpreter)
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # forks inherit it: closed when the process that asks has ended
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
            )
        self._stream = self._channel.makefile("rw")

    def ask(self, what: str, **more: Any) -> Any:
        """One request and its answer. Interrupted, it ends the interpreter: answers would be mixed up."""
        try:
            self._stream.write(json.dumps({"what": what, **more}) + "\n")
            self._stream.flush()
            answer = self._stream.readline()
            if not answer:
                self._output.seek(0)
                raise RuntimeError(
                    f"tests.forks ended: {self._output.read()[-4000:].decode(errors='replace')}"
                )
            return json.loads(answer)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End it and all its forks."""
        if _interpreters.get(self.number) is self:
            del _interpreters[self.number]
        with contextlib.suppress(OSError):
            self._stream.close()
        self._channel.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    @property
    def number(self) -> int:
        """Its place among the interpreters, or -1."""
        return next((key for key, value in _interpreters.items() if value is self), -1)


class Fork:
    """A process; as subprocess.Popen, and as a rank of megamm.parity.processes."""

    def __init__(self, interpreter: Interpreter, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._interpreter = interpreter

    def exit_status(self) -> int | None:
        """The exit status (of a signal: its negative), or None while it runs. It stays a zombie."""
        if self.returncode is not None:
            return self.returncode
        status = self._interpreter.ask("status", pid=self.pid)
        assert status is None or isinstance(status, int)
        return status

    def reap(self) -> None:
        """Wait for its end, by which its id becomes free."""
        if self.returncode is None:
            self.returncode = self._interpreter.ask("reap", pid=self.pid)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.exit_status() is not None:
            self.reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(0.01)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)


_interpreters: dict[int, Interpreter] = {}


def start(rank: int, target: str, args: list[str], env: Mapping[str, str], log: Path) -> Fork:
    """Call `target`, "module:function", in a new process; what it returns is the exit status.

    Args:
        rank: decides which interpreter it comes from.
        args: arguments of the function.
        env: the whole environment, one that is `possible`.
        log: its output is appended here.
    """
    assert possible(env)
    number = rank % INTERPRETERS
    interpreter = _interpreters.get(number)
    if interpreter is None or interpreter.owner != os.getpid():
        interpreter = _interpreters[number] = Interpreter()
    job = {"target": target, "args": args, "env": dict(env), "log": str(log.absolute())}
    return Fork(interpreter, interpreter.ask("start", **job))


def possible(env: Mapping[str, str]) -> bool:
    """Whether a fork is what a new interpreter would be: the number of threads is set when torch is imported,
    and CUDA does not survive a fork."""
    from megamm.device import num_gpus

    return env.get("OMP_NUM_THREADS") == "1" and num_gpus() == 0


def warm(count: int) -> None:
    """Start the first interpreters, which then import side by side."""
    for number in range(min(count, INTERPRETERS)):
        if number not in _interpreters:
            _interpreters[number] = Interpreter()


def close() -> None:
    """End all interpreters."""
    for interpreter in list(_interpreters.values()):
        interpreter.close()


# --- in the interpreter -----------------------------------------------------------------------------------


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Answer until the channel is closed; in a fork, return its job."""
    stream = channel.makefile("rw")
    forks: set[int] = set()
    with contextlib.suppress(ConnectionError):  # whoever is killed with an answer unread resets the channel
        for line in stream:
            request = json.loads(line)
            answer: int | None
            if request["what"] == "start":
                answer = _fork()
                if answer == 0:
                    stream.close()
                    channel.close()
                    return dict(request)
                forks.add(answer)
            elif request["what"] == "status":
                info = os.waitid(os.P_PID, request["pid"], os.WEXITED | os.WNOHANG | os.WNOWAIT)
                answer = None if info is None else info.si_status
                if info is not None and info.si_code != os.CLD_EXITED:
                    answer = -info.si_status
            else:
                answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
                forks.remove(request["pid"])
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
    for pid in forks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def _fork() -> int:
    """A fork that leads a session of its own, by the time that this returns."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.close(told)
        os.close(ready)
        return 0
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return pid


def _run(job: dict[str, Any]) -> Any:
    os.environ.clear()
    os.environ.update(job["env"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    import numpy as np

    np.random.seed()  # Python's generator is seeded anew in a fork, numpy's is not
    module, function = job["target"].split(":")
    return getattr(importlib.import_module(module), function)(*job["args"])


def _main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    for name in WARM:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what was imported need not be looked through, nor copied, in the forks
    if (job := _serve(channel)) is not None:
        sys.exit(_run(job))
    os._exit(0)  # an orderly end of what was imported can hang


if __name__ == "__main__":
    _main()
