"""Rank 0's screen: a progress bar with lines above it on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class Console:
    """Shows lines, and how far a stage is."""

    def __init__(self, name: str, total_steps: int, start_step: int) -> None:
        self._is_losing = False
        self._progress = _progress_bar() if sys.stdout.isatty() else None
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=total_steps, completed=start_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """`step` is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def print(self, text: str) -> None:
        """Show a line, unless the disk that standard output goes to is full."""
        try:
            if self._progress is not None:
                self._progress.console.print(text, markup=False, highlight=False)
            else:
                print(text, flush=True)
        except BrokenPipeError:
            raise
        except OSError:
            self._is_losing = True

    def close(self) -> None:
        """Leave the terminal as it was; may be called again."""
        if self._progress is not None:
            self._progress.stop()
        if self._is_losing:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would end with a code of its own


def _progress_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
