"""Formats whose files are lists of records that stand for themselves, and the conversations they become."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megamm.data.conversation import Conversation, ImageRef, Skipped
from megamm.data.formats.base import Chunk, Format
from megamm.data.json_entries import Block, decode_block, entry_blocks
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError


class RecordFormat(Format):
    """Each entry of a JSON list or of JSON lines is read on its own.

    Attributes:
        key: of the list within a JSON object; None where the file is the list.
    """

    key: ClassVar[str | None] = None

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            blocks = self.blocks(path)
            first = next(blocks, None)
            if first is None:
                raise InputError(f"{path}: holds no entries; give files with the layout of --format")
            yield Chunk(str(path), number, first)
            yield from (Chunk(str(path), number, block) for block in blocks)

    def blocks(self, path: Path) -> Iterator[Block]:
        """The entries of a file as text."""
        return entry_blocks(path, self.key)

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        for position, value in decode_block(Path(chunk.source), chunk.payload):
            entry = self.entry(value, position, f"{chunk.source}: entry {position + 1}")
            if entry is not None:
                yield entry

    @abstractmethod
    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped | None:
        """What one entry becomes; None where it is of another part of the data.

        Raises:
            InputError: begins with `where`.
        """


def answered(
    key: str, position: int, image: ImageRef | None, question: str, answer: str, task: str = "vqa"
) -> Conversation | Skipped:
    """A question about an image (or none) and its answer; left out if there is no answer."""
    if not answer:
        return Skipped(key, position, "has no answer")
    images = [] if image is None else [image]
    place = "" if image is None else f"{IMAGE_TOKEN}\n"
    turns = [Turn("user", place + question), Turn("assistant", answer)]
    return Conversation(key, position, images, turns, task)


def captioned(key: str, position: int, image: ImageRef, caption: str) -> Conversation | Skipped:
    """An image and what it shows; left out if nothing is said."""
    if not caption:
        return Skipped(key, position, "has no caption")
    return Conversation(
        key, position, [image], [Turn("user", IMAGE_TOKEN), Turn("assistant", caption)], "caption"
    )


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question with its choices, one on each line behind its letter."""
    return "\n".join([question, *(f"{letter(i)}. {choice}" for i, choice in enumerate(choices))])


def letter(number: int) -> str:
    """The letter of a choice, from 0."""
    return chr(ord("A") + number)


MAX_CHOICES = 26


def coco_names(image_id: int) -> ImageRef:
    """The names that an image of COCO has in its releases of 2014 and 2017; an id is in one split only."""
    names = []
    for split in ("train", "val"):
        name = f"COCO_{split}2014_{image_id:012d}.jpg"
        names += [name, f"{split}2014/{name}", f"{split}2017/{image_id:012d}.jpg"]
    return (*names, f"{image_id:012d}.jpg")
