"""Files of a run's log: a disk that is full costs rows of them, never the run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class AppendedFile:
    """A file that lines are appended to, as long as that is possible.

    Args:
        complain: is told, once for each time that lines begin to be lost.
    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, complain: Callable[[str], object]) -> None:
        self.path = path
        self._complain = complain
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._is_losing = False

    def write(self, line: str) -> None:
        """Append a line, which ends with a newline. What a full disk leaves of one is a line of its own,
        which readers pass over."""
        try:
            data = ("\n" * self._is_losing + line).encode()
            if os.write(self._descriptor, data) < len(data):
                raise OSError(0, "No space left on device")
            self._is_losing = False
        except OSError as error:
            was_losing, self._is_losing = self._is_losing, True
            if not was_losing:
                self._complain(
                    f"{self.path}: cannot be written ({error.strerror}); training goes on without it"
                )

    def close(self) -> None:
        """Close it; may be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
