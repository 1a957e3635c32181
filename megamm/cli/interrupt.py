"""Ctrl-C at any moment, also while libraries are imported."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_AGAIN_S = 0.05


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in this block, but not within an import: extensions such as torch's
    call Python while they are loaded, and an exception there ends the process by abort(). It is raised as
    soon as the import is through."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored by a shell in the background, or somebody's own
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        # what is left is Python's own end, in which libraries clean up: nothing is gained by interrupting
        # that
        atexit.unregister(_ignore)
        atexit.register(_ignore)  # the last one registered is the first one called


def _ignore() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _is_importing(frame):
        raise KeyboardInterrupt
    timer = threading.Timer(_AGAIN_S, os.kill, [os.getpid(), number])
    timer.daemon = True
    timer.start()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
