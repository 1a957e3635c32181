"""Stacks of processes, and their end.

A process that is stopped, or holds Python's lock for ever, cannot be asked by any thread of its own. A signal
handler of the C level can write its stacks: into an unnamed file of its own, which another process of the
same user reads from /proc.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

from megamm.training.watchdog.beat import Beat

SIGNAL = signal.SIGUSR2
NAME = "megamm-open-book"
PATIENCE_S = 3.0  # for another process to write its stacks
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')


class OpenBook:
    """Two files without a name in which other processes of this machine can read what this one does: its
    whereabouts, and the stacks of all its threads, which it writes on SIGUSR2.

    Attributes:
        whereabouts, stacks: descriptors; -1 where the system has no such files.
    """

    def __init__(self) -> None:
        self.whereabouts = self.stacks = -1
        if hasattr(os, "memfd_create") and hasattr(faulthandler, "register"):
            self.whereabouts, self.stacks = (os.memfd_create(NAME, os.MFD_CLOEXEC) for _ in range(2))
            faulthandler.register(SIGNAL, file=self.stacks, all_threads=True)

    def close(self) -> None:
        """Listen no longer."""
        if self.stacks >= 0:
            faulthandler.unregister(SIGNAL)
            os.close(self.stacks)
            os.close(self.whereabouts)
            self.whereabouts = self.stacks = -1


def write_own_stacks(beat: Beat, path: Path) -> None:
    """Write the stacks of all threads of this process into a file, below its sign of life."""
    with path.open("w") as file:
        file.write(beat.heading() + "\n\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def ask(beat: Beat, path: Path) -> Beat:
    """Have another process of this machine write its stacks, also one that is stopped; it is stopped
    afterwards.

    Args:
        beat: its last sign of life.
        path: file for the stacks.
    Returns:
        The sign of life that it would have given last.
    """
    stacks = ""
    with contextlib.suppress(OSError, ValueError):
        written, places = _book_of(beat)
        whereabouts = places.read_text()
        os.kill(beat.pid, SIGNAL)
        os.kill(beat.pid, signal.SIGCONT)
        stacks = _wait_for_text(written)
        os.kill(beat.pid, signal.SIGSTOP)  # it must not go on while the others end
        beat = _at_last(beat, whereabouts, stacks)
    with contextlib.suppress(OSError):
        path.write_text(f"{beat.heading()}\n\n{stacks or 'it could not be asked for its stacks'}\n")
    return beat


def kill(beat: Beat) -> None:
    """End another process of this machine, also one that is stopped."""
    with contextlib.suppress(OSError):
        _book_of(beat)
        os.kill(beat.pid, signal.SIGKILL)


def _book_of(beat: Beat) -> tuple[Path, Path]:
    """The files of the OpenBook of a process: stacks and whereabouts.

    Raises:
        OSError: it has ended, and what has its number now is another process.
    """
    found = [Path(f"/proc/{beat.pid}/fd/{number}") for number in (beat.stacks, beat.whereabouts)]
    if any(NAME not in os.readlink(path) for path in found):
        raise ProcessLookupError(beat.pid)
    return found[0], found[1]


def _at_last(beat: Beat, whereabouts: str, stacks: str) -> Beat:
    step, phase, micro_batch, samples = json.loads(whereabouts.splitlines()[0])
    code = _innermost(stacks) or beat.code
    place = {"step": step, "phase": phase, "micro_batch": micro_batch, "samples": samples, "code": code}
    return replace(beat, **place, is_exact=True)


def _innermost(stacks: str) -> str | None:
    """What the main thread, the last one in the text, ran: its innermost function of megamm or megatron, and
    the one of torch.distributed that this has called."""
    frames = _FRAME.findall(stacks.rpartition("hread 0x")[2])
    own = next(
        (n for n, (path, _, _) in enumerate(frames) if "/megamm/" in path or "/megatron/" in path), None
    )
    if own is None:
        return None
    path, line, name = frames[own]
    package = "megamm/" if "/megamm/" in path else "megatron/"
    code = f"{name} ({package}{path.rpartition(package)[2]}:{line})"
    called = next((name for path, _, name in frames[:own] if "/torch/distributed/" in path), None)
    return f"{called}, called by {code}" if called else code


def _wait_for_text(source: Path) -> str:
    """What is in a file once it has not grown for a moment."""
    deadline, before, text = time.monotonic() + PATIENCE_S, None, ""
    while time.monotonic() < deadline and (not text or text != before):
        time.sleep(0.02)
        before, text = text, source.read_text(errors="replace")
    return text
