"""Readers of the layouts in which conversations come, one file per layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megamm.data.conversation import Conversation
from megamm.data.formats import llava
from megamm.errors import InputError

READERS: dict[str, Callable[[Path], Iterator[Conversation]]] = {"llava": llava.read}


def reader(name: str) -> Callable[[Path], Iterator[Conversation]]:
    """The function that reads conversations from a file of format `name`; InputError if unknown."""
    if name not in READERS:
        raise InputError(f"format: there is no {name!r}; choose one of {', '.join(READERS)}")
    return READERS[name]
