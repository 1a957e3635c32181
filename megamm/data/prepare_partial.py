"""The directory in which `megamm prepare` works beside `out`: who works there, and how far the work has come.

`.NAME.partial` holds a lock, the journal, the index of image names, and `dataset`, which is renamed to `out`
in the end. The journal says at times how many chunks are in the files and how long each file was then, after
all of it has reached the disk. Whoever goes on cuts the files there and renders the chunks that come next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamm.errors import InputError, RunError

LOCK, JOURNAL, DATASET = "lock", "journal.jsonl", "dataset"


@dataclass
class Progress:
    """How far a preparation has come: chunks that are in the files, sizes of the files, counts."""

    chunks: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Partial:
    """The working directory of one `out`; a context manager that holds its lock.

    Attributes:
        path: of the directory.
        dataset: directory that will be `out`.
    """

    def __init__(self, out: Path):
        self.out = out
        self.path = out.parent / f".{out.name}.partial"
        self.dataset = self.path / DATASET
        self._journal: int | None = None
        self._lock: int | None = None

    def __enter__(self) -> Partial:
        with self.writing():
            self._lock = self._take_lock()
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in (self._journal, self._lock):
            if descriptor is not None:
                os.close(descriptor)
        self._journal = self._lock = None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Errors of the disk in one sentence: a RunError."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.out}: cannot be written ({error.strerror or error}); free or choose another disk and "
                f"run the same command again, it goes on from {self.path} if that is there"
            ) from None

    def begin(self, identity: str, restart: bool) -> Progress:
        """What is done already of the preparation `identity`, and from where to go on.

        Raises:
            InputError: the directory holds part of another preparation and `restart` is not set.
        """
        with self.writing():
            lines = [] if restart else self._lines()
            if lines and lines[0] != {"identity": identity}:
                raise InputError(
                    f"{self.path}: holds unfinished work from other sources, options or another version; "
                    "run `megamm prepare` as then, or with --restart to throw that work away"
                )
            if not lines:
                self._clear()
                self.dataset.mkdir()
            self._journal = os.open(
                self.path / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            )
            if not lines:
                self._append({"identity": identity})
            else:  # the end of a line that was being written
                os.ftruncate(self._journal, sum(len(_encoded(line)) for line in lines))
        return Progress(**lines[-1]) if len(lines) > 1 else Progress()

    def record(self, progress: Progress) -> None:
        """Add to the journal; what it speaks of must have reached the disk."""
        self._append(asdict(progress))

    def commit(self) -> None:
        """Make `dataset` appear as `out` and remove the rest."""
        with self.writing():
            os.rename(self.dataset, self.out)
            descriptor = os.open(self.out.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        self.discard()

    def discard(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_lock(self) -> int:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
                os.close(descriptor)
                raise InputError(
                    f"{self.out}: is being prepared by {owner or 'another process'}; "
                    "wait for it or choose another --out"
                ) from None
            if _same_file(descriptor, self.path / LOCK):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor
            os.close(descriptor)  # whoever held it has finished and removed it

    def _lines(self) -> list[dict[str, Any]]:
        """The journal up to the first line that is none."""
        try:
            data = (self.path / JOURNAL).read_bytes()
        except FileNotFoundError:
            return []
        lines: list[dict[str, Any]] = []
        for line in data.splitlines(keepends=True):
            try:
                content = json.loads(line)
            except ValueError:
                break
            if not isinstance(content, dict) or _encoded(content) != line:
                break
            lines.append(content)
        return lines

    def _append(self, content: dict[str, Any]) -> None:
        assert self._journal is not None, "begin comes first"
        line = _encoded(content)
        if os.write(self._journal, line) != len(line):
            raise OSError(28, "No space left on device")
        os.fsync(self._journal)

    def _clear(self) -> None:
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


def _encoded(content: dict[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
