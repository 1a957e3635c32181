"""How far an evaluation is, on stderr: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_EVERY_S = 60.0
Advance = Callable[[int], None]


@contextmanager
def progress(total: int, done: int, copies: int) -> Iterator[Advance]:
    """Gives a function to be told how many more questions this copy of the model has answered.

    Args:
        total: questions of this copy.
        done: of these, answered in an earlier attempt.
        copies: of the model, which are taken to be equally fast.
    """
    if not sys.stderr.isatty():
        yield _Lines(total, done, copies).advance
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[rate]:.1f} questions/s")
    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("evaluating", total=total * copies, completed=done * copies, rate=0.0)
        start, asked = time.monotonic(), 0

        def advance(count: int) -> None:
            nonlocal asked
            asked += count
            rate = asked * copies / max(time.monotonic() - start, 1e-9)
            bar.update(task, advance=count * copies, rate=rate)

        yield advance


class _Lines:
    """A line at most once in LINE_EVERY_S seconds."""

    def __init__(self, total: int, done: int, copies: int) -> None:
        self._total, self._done, self._copies = total, done, copies
        self._asked, self._start = 0, time.monotonic()
        self._last = self._start

    def advance(self, count: int) -> None:
        self._done += count
        self._asked += count
        now = time.monotonic()
        if now - self._last < LINE_EVERY_S or self._done >= self._total:
            return
        self._last = now
        rate = self._asked / (now - self._start)
        left = (self._total - self._done) / rate
        print(
            f"evaluate: {self._done * self._copies} of {self._total * self._copies} questions, "
            f"{rate * self._copies:.1f} per second, {left / 60:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
