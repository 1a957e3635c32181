"""The list of images that could not be read, for the user to repair."""

from __future__ import annotations

import json
import os
from pathlib import Path

from megamm.data.indexed import PreparedDataset
from megamm.errors import RunError


class Quarantine:
    """Appends one JSON line per bad image; lines of several processes do not mix.

    Attributes:
        path: the file; None: nothing is recorded.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._seen: set[int] = set()

    def add(self, dataset: PreparedDataset, image: int, sample: int, global_index: int, reason: str) -> None:
        """Record an image, once.

        Args:
            image: its record in the dataset.
            sample, global_index: whose image it is, and where in the order that sample stood.

        Raises:
            RunError: the file cannot be written.
        """
        if self.path is None or image in self._seen:
            return
        self._seen.add(image)
        location = dataset.location(image)
        line = {
            "source": dataset.store.source(location),
            "key": location.name,
            "reason": reason,
            "sample": sample,
            "global_index": global_index,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); free the disk") from None
