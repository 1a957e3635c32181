"""What an example of a source format is, and the small files it is made of."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megamm.data.conversation import Conversation
from megamm.data.formats import FormatOptions
from megamm.data.templates import Turn
from tests.data.helpers import encode, picture

SHORT = "What is on the table?"


@dataclass(frozen=True)
class Wanted:
    """A conversation that must come out: the bytes of its images, its turns and its task."""

    images: list[bytes]
    turns: list[Turn]
    task: str = ""


@dataclass(frozen=True)
class Example:
    """A small data set in the layout of a format.

    Attributes:
        format: its name in FORMATS.
        sources: the files to read.
        images: folders and tars that hold the images which the format names.
        wanted: the conversations that must come out, in this order.
        skipped: parts of the reasons for the entries that are left out, in this order.
    """

    format: str
    sources: list[Path]
    images: list[Path]
    wanted: list[Wanted]
    skipped: list[str] = field(default_factory=list)
    options: FormatOptions = field(default_factory=FormatOptions)

    @property
    def role(self) -> str:
        """Of the first turns: "document" for interleaved and plain texts, which need a template for them."""
        return self.wanted[0].turns[0].role


def jpeg(seed: int) -> bytes:
    """A small picture."""
    return encode(picture(seed), "JPEG")


def heavy(seed: int) -> bytes:
    """A picture of more than 10 kilobytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (80, 60, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "PNG")


def files(folder: Path, named: dict[str, bytes]) -> Path:
    """A folder with these files, also below folders of its own."""
    for name, data in named.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def tar(
    path: Path, named: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    """An uncompressed tar with these members."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in named.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_json(path: Path, value: Any) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def qa(question: str, answer: str) -> list[Turn]:
    """A question and its answer."""
    return [Turn("user", question), Turn("assistant", answer)]


def caption(image: bytes, text: str) -> Wanted:
    """An image and its caption."""
    return Wanted([image], qa("<image>", text), "caption")


def seen(example: Example, conversation: Conversation) -> Wanted:
    """What came out, its images read: the first name that one of the folders has, or the place in a tar."""
    pictures = []
    for image in conversation.images:
        if isinstance(image, tuple) and hasattr(image, "offset"):
            with open(image.tar, "rb") as file:
                file.seek(image.offset)
                data = file.read(image.length)
            if image.encoding == "base64":
                data = base64.b64decode(data, validate=True)
        else:
            names = [image] if isinstance(image, str) else image
            found = [
                folder / name for name in names for folder in example.images if (folder / name).is_file()
            ]
            assert found, f"none of {names} in {example.images}"
            data = found[0].read_bytes()
        pictures.append(data)
    return Wanted(pictures, conversation.turns, conversation.task)
