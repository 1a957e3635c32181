"""How far a preparation is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from megamm.data.formats import Chunk

LINE_SECONDS = 30.0
BAR_SECONDS = 0.2


class ProgressDisplay:
    """Shows samples, samples per second and the time that is left, by the bytes of the sources read so far.
    Where the system does not tell how far a source is read, whole sources count. A context manager."""

    def __init__(self, sources: list[Path], shown: bool):
        sizes = [path.stat().st_size for path in sources]
        self._before = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
        self._total = max(1, sum(sizes))
        self._source, self._number = "", 0
        self._shown = shown
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last = time.monotonic()
        self._first: tuple[float, int] | None = None  # fraction and samples at the first update

    def __enter__(self) -> ProgressDisplay:
        if self._shown and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task("prepare", total=None, rate="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks, remembering where they come from."""
        for chunk in chunks:
            self._source, self._number = chunk.source, chunk.source_number
            yield chunk

    def stage(self, text: str) -> None:
        """Say what is being done beside rendering."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        elif self._shown and time.monotonic() - self._last >= LINE_SECONDS:
            self._say(text)

    def update(self, samples: int) -> None:
        """Samples that are written, those of an earlier run included."""
        now = time.monotonic()
        if not self._shown or now - self._last < (BAR_SECONDS if self._bar is not None else LINE_SECONDS):
            return
        fraction = self._fraction()
        if self._first is None:
            self._start, self._first = now, (fraction, samples)
        elapsed = max(now - self._start, 1e-9)
        rate = (samples - self._first[1]) / elapsed
        done = fraction - self._first[0]
        left = elapsed * (1 - fraction) / done if done > 0 else None
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=f"prepare: {samples} samples",
                total=1.0 if fraction else None,
                completed=fraction,
                rate=f"{rate:.0f} samples/s" + ("" if left is None else f", {_clock(left)} left"),
            )
            self._last = now
        else:
            ending = "" if left is None else f", {100 * fraction:.0f} %, {_clock(left)} left"
            self._say(f"{samples} samples, {rate:.0f} samples/s{ending}")

    def _say(self, text: str) -> None:
        print(f"prepare: {text}", file=sys.stderr, flush=True)
        self._last = time.monotonic()

    def _fraction(self) -> float:
        return min(1.0, (self._before[self._number] + _position(self._source)) / self._total)


def _position(path: str) -> int:
    """How far this process has read a file that it has open; 0 where the system does not tell."""
    try:
        for number in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{number}") == os.path.realpath(path):
                return int(Path(f"/proc/self/fdinfo/{number}").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")
    return Progress(*columns, console=Console(stderr=True), transient=True)
