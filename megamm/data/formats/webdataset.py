"""Tars of image-text pairs as img2dataset writes them: key.jpg, key.txt, key.json side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.conversation import Conversation, Skipped, TarPlace
from megamm.data.formats.base import CHUNK_ENTRIES, Chunk, Format
from megamm.data.formats.fields import words
from megamm.data.formats.records import captioned
from megamm.data.formats.tar_members import Member, members, open_tar, read, stretches
from megamm.errors import InputError

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
MAX_TEXT = 1 << 20  # bytes of a caption or its description


class WebDataset(Format):
    """Members with the same name up to the first dot are a sample: an image (jpg, jpeg, png, webp, gif, bmp,
    tif, tiff, ppm) and its caption, from the .txt or else "caption" of the .json. Samples without one of
    them, with two images, or whose "status" is not "success" are left out. Images stay in the tar."""

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            found = False
            for stretch in stretches(path, lambda name: split(name)[0], CHUNK_ENTRIES):
                found = True
                yield Chunk(str(path), number, stretch)
            if not found:
                raise InputError(f"{path}: holds no files; give tars as img2dataset writes them")

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        with open_tar(chunk.source) as tar:
            position, key = chunk.payload.first, None
            parts: dict[str, Member] = {}
            twice = False
            for member in members(tar, chunk.payload.start, chunk.payload.end):
                name, ending = split(member.name)
                if name != key:
                    if key is not None:
                        yield _sample(tar, chunk.source, key, position, parts, twice)
                        position += 1
                    key, parts, twice = name, {}, False
                kind = "image" if ending in IMAGES else ending
                if kind in ("image", "txt", "json"):
                    twice = twice or kind in parts
                    parts[kind] = member
            if key is not None:
                yield _sample(tar, chunk.source, key, position, parts, twice)

    def image_tars(self, sources: Sequence[Path]) -> list[Path]:
        return list(sources)


def split(name: str) -> tuple[str, str]:
    """Key and ending of a member: what stands before and after the first dot of its file name."""
    folder, slash, file = name.rpartition("/")
    key, _, ending = file.partition(".")
    return folder + slash + key, ending.lower()


def _sample(
    tar: int, source: str, key: str, position: int, parts: dict[str, Member], twice: bool
) -> Conversation | Skipped:
    reason = _reason_against(parts, twice)
    if reason:
        return Skipped(key, position, reason)
    about: Any = None
    if "json" in parts:
        try:
            about = json.loads(read(tar, parts["json"]))
        except (ValueError, RecursionError):
            return Skipped(key, position, "its .json is no JSON")
        if not isinstance(about, dict) or about.get("status", "success") != "success":
            return Skipped(key, position, "its .json does not say that it was fetched")
    if "txt" in parts:
        caption = words(read(tar, parts["txt"]).decode("utf-8", "replace"))
    else:
        caption = words(about.get("caption"))
    image = parts["image"]
    place = TarPlace(source, image.name, image.offset, image.length)
    return captioned(key, position, place, caption or "")


def _reason_against(parts: dict[str, Member], twice: bool) -> str:
    if twice:
        return "has two images or texts of the same key"
    if "image" not in parts:
        return "has no image"
    if "txt" not in parts and "json" not in parts:
        return "has no caption"
    if any(kind != "image" and member.length > MAX_TEXT for kind, member in parts.items()):
        return f"its caption has more than {MAX_TEXT} bytes"
    return ""
