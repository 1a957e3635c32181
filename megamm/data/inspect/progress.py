"""How far a long look has come, on stderr: one changing line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

TERMINAL_S, PLAIN_S = 0.2, 30.0  # between two reports


class Progress:
    """Says how many of `total` are done and when the rest will be; a context manager."""

    def __init__(self, what: str, total: int, shown: bool) -> None:
        self._what, self._total, self._shown = what, total, shown
        self._terminal = shown and sys.stderr.isatty()
        self._start = time.monotonic()
        self._next = self._start + (TERMINAL_S if self._terminal else PLAIN_S)
        self._done = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self._done += count
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + (TERMINAL_S if self._terminal else PLAIN_S)
        line = progress_line(self._what, self._done, self._total, now - self._start)
        if self._terminal:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def progress_line(what: str, done: int, total: int, seconds: float) -> str:
    """Done, share, speed and time left."""
    rate = done / max(seconds, 1e-9)
    left = round((total - done) / rate) if rate else 0
    minutes, rest = divmod(left, 60)
    hours, minutes = divmod(minutes, 60)
    share = 100 * done / max(total, 1)
    return f"{what}: {done}/{total} ({share:.0f} %), {rate:.0f}/s, {hours}:{minutes:02}:{rest:02} left"
