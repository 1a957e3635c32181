"""Rank 0's screen: a progress bar with lines above it on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any


class Console:
    """Shows lines, and how far a stage is."""

    def __init__(self, name: str, total_steps: int, start_step: int) -> None:
        self._progress = _progress_bar() if sys.stdout.isatty() else None
        if self._progress is not None:
            self._task = self._progress.add_task(name, total=total_steps, completed=start_step)
            self._progress.start()

    def advance(self, step: int) -> None:
        """`step` is done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def print(self, text: str) -> None:
        """Show a line."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leave the terminal as it was; may be called again."""
        if self._progress is not None:
            self._progress.stop()


def _progress_bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
