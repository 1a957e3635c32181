"""A decoder with defects, for worker processes: what it does stands in a comment of the JPEG."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megamm.data import workers
from megamm.data.images_pillow import PillowLoader
from megamm.data.indexed import PreparedDataset
from tests.data.helpers import encode

KILL, HANG, RAISE = b"kill", b"hang", b"raise"
PROGRAM = workers.PROGRAM.replace("main({", "from tests.data.deadly import install; install(); main({")


def deadly(picture: Image.Image, what: bytes) -> bytes:
    """A good JPEG, but not for the loader below."""
    return encode(picture, "JPEG", comment=what * 8)


def install() -> None:
    """Break the decoder of this process, and have it read changed images too."""
    load: Callable[..., Any] = PillowLoader.load

    def broken(self: PillowLoader, data: Sequence[bytes], keys: Sequence[int]) -> Any:
        for item in data:
            if KILL * 8 in item:
                os.kill(os.getpid(), signal.SIGKILL)
            if HANG * 8 in item:
                time.sleep(1000)
            if RAISE * 8 in item:
                raise ZeroDivisionError("a defect")
        return load(self, data, keys)

    PillowLoader.load = broken  # type: ignore[method-assign]
    PreparedDataset.read_image = read_unchecked  # type: ignore[method-assign]


def read_unchecked(dataset: PreparedDataset, image: int) -> bytes:
    """PreparedDataset.read_image of an image in a folder, changed or not."""
    location = dataset.location(image)
    return Path(dataset.store.source(location), location.name).read_bytes()
