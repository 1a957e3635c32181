"""What a source format is to `megamm prepare`: how its files are cut into chunks, and what a chunk holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megamm.data.conversation import Conversation, Skipped
from megamm.errors import InputError

CHUNK_ENTRIES = 256


class Chunk(NamedTuple):
    """A piece of the sources, rendered by one process at a time; small enough to hold, picklable.

    Attributes:
        source: the file it comes from, for reports.
        source_number: its place in the list of sources.
        payload: what the format needs to read the piece: entries, text, or where to find them.
    """

    source: str
    source_number: int
    payload: Any


@dataclass(frozen=True)
class FormatOptions:
    """What a user may choose of a format; each format uses some and says in its docstring which.

    Attributes:
        split: the part of the data that is wanted ("train", ...), where one file holds several.
        min_similarity: interleaved documents: an image is kept if its text matches at least so well.
        max_images: interleaved documents: images of one document.
        keep_single_image: interleaved documents: share of the documents with one image that stays.
    """

    split: str = "train"
    min_similarity: float = 0.24
    max_images: int = 6
    keep_single_image: float = 0.5

    def __post_init__(self) -> None:
        """Raises InputError where a number is out of its range."""
        if not -1 <= self.min_similarity <= 1:
            raise InputError(f"min_similarity: is {self.min_similarity}; give a number from -1 to 1")
        if self.max_images < 1:
            raise InputError(f"max_images: is {self.max_images}; give 1 or more")
        if not 0 <= self.keep_single_image <= 1:
            raise InputError(f"keep_single_image: is {self.keep_single_image}; give a number from 0 to 1")


class Format(ABC):
    """A layout of source files. Chunks do not depend on the number of processes, so neither do the bytes
    that `megamm prepare` writes.

    Attributes:
        uses: the options (fields of FormatOptions) that make a difference.
    """

    uses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: FormatOptions = FormatOptions()) -> None:
        self.options = options

    @abstractmethod
    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        """The pieces of all sources, in their order; runs in one process and is cheap for every entry.

        Raises:
            InputError: names file, entry and what is wrong with it.
        """

    @abstractmethod
    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        """The entries of a chunk, checked; runs in any process.

        Raises:
            InputError: names file, entry and what is wrong with it.
        """

    def image_tars(self, sources: Sequence[Path]) -> list[Path]:
        """Tar files among the sources in which images lie that this format names by their place."""
        return []

    def conversations(self, sources: Sequence[Path]) -> Iterator[Conversation]:
        """Every entry of the sources that is not left out, read in this process."""
        for chunk in self.chunks(sources):
            yield from (entry for entry in self.read(chunk) if isinstance(entry, Conversation))
