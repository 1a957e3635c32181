"""The list of images that could not be read, for the user to repair."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple

from megamm.data.concatenated import ConcatenatedDataset
from megamm.errors import RunError

KILLS = "kills the decoder"  # the reason of an image that took its loader process down


class FileName(NamedTuple):
    """What an image is to the user: the folder or tar it lies in, and its name there."""

    source: str
    key: str


def file_name(dataset: ConcatenatedDataset, image: int) -> FileName:
    """The name of the image with record `image`."""
    return FileName(dataset.image_source(image), dataset.location(image).name)


class Quarantine:
    """Appends one JSON line per bad image, whichever and however many processes meet it, also over restarts.

    Attributes:
        path: the file; None: nothing is recorded.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._seen: dict[FileName, str] = {}  # with the reasons, of this and all other processes
        self._end = 0  # of what has been read of the file

    def add(
        self, dataset: ConcatenatedDataset, image: int, sample: int, global_index: int, reason: str
    ) -> None:
        """Record an image, once.

        Args:
            image: its record in the dataset.
            sample, global_index: whose image it is, and where in the order of its group that sample
                stood.

        Raises:
            RunError: the file cannot be written.
        """
        name = file_name(dataset, image)
        if self.path is None or not self._is_news(name, reason):
            return
        directory, row = dataset.origin(sample)
        line = name._asdict() | {
            "reason": reason,
            "dataset": str(directory),
            "sample": row,
            "global_index": global_index,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # goes with the descriptor
                cut_short = self._read(descriptor)
                if self._is_news(name, reason):
                    text = "\n" * cut_short + json.dumps(line) + "\n"
                    os.write(descriptor, text.encode())
                    self._seen[name] = reason
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); free the disk") from None

    def killers(self) -> frozenset[FileName]:
        """The images that have killed a loader process before.

        Raises:
            RunError: the file is there and cannot be read.
        """
        if self.path is not None and self.path.exists():
            try:
                with open(self.path, "rb") as file:
                    self._read(file.fileno())
            except OSError as error:
                raise RunError(
                    f"{self.path}: cannot be read ({error.strerror}); allow it or remove the file"
                ) from None
        return frozenset(name for name, reason in self._seen.items() if reason == KILLS)

    def _is_news(self, name: FileName, reason: str) -> bool:
        """A killer is said to be one, whatever was wrong with it before."""
        return name not in self._seen or (reason == KILLS and self._seen[name] != KILLS)

    def _read(self, descriptor: int) -> bool:
        """Learn what has been appended since the last time; whether a crash has cut the last line short."""
        size = os.fstat(descriptor).st_size
        if size < self._end:  # someone has cleared the file
            self._end = 0
        text = os.pread(descriptor, size - self._end, self._end)
        complete = text[: text.rfind(b"\n") + 1]
        self._end += len(complete)
        for line in complete.splitlines():
            try:
                entry = json.loads(line)
                self._seen[FileName(str(entry["source"]), str(entry["key"]))] = str(entry["reason"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # not a line of ours
        return len(complete) < len(text)
