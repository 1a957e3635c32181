"""MMC4: documents of sentences and images with the similarity of each to each.

{"text_list": [...], "image_info": [{"image_name", "raw_url", ...}], "similarity_matrix": [images][sentences],
"url", ...}, as JSON lines (also zipped, as they are distributed), or one JSON file per document in a tar,
with the image itself as "image_base64" in each "image_info" (as OpenFlamingo's conversion writes it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megamm.data.conversation import Conversation, ImageRef, Skipped, TarPlace
from megamm.data.formats.assignment import best_assignment
from megamm.data.formats.base import Chunk, FormatOptions
from megamm.data.formats.fields import is_name, words
from megamm.data.formats.interleaved import document, url_names
from megamm.data.formats.records import RecordFormat
from megamm.data.formats.tar_members import Member, Stretch, members, open_tar, read, stretches
from megamm.data.image_store import tarfile_like
from megamm.errors import InputError

MIN_KILOBYTES = 10  # an image of so many whole kilobytes or less is an icon
MAX_DOCUMENT = 1 << 28  # bytes of one JSON file in a tar
MAX_IMAGES, MAX_CELLS = 500, 1_000_000  # of a similarity matrix; bounds the time of the assignment
DOCUMENTS = 32  # of a tar in a chunk: they hold their images

_BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}", re.ASCII)


class Mmc4(RecordFormat):
    """Each image goes before the sentence that the best one-to-one assignment by similarity gives it, if
    they match by `min_similarity` at least; the options `max_images` and `keep_single_image` hold too.

    In a tar, images of up to 10 kilobytes are left aside first.
    """

    uses = ("min_similarity", "max_images", "keep_single_image")

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            if not tarfile_like(path):
                yield from (chunk._replace(source_number=number) for chunk in super().chunks([path]))
                continue
            found = False
            for stretch in stretches(path, lambda name: name, DOCUMENTS):
                found = True
                yield Chunk(str(path), number, stretch)
            if not found:
                raise InputError(f"{path}: holds no files; give tars of JSON documents")

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        if not isinstance(chunk.payload, Stretch):
            yield from super().read(chunk)
            return
        position, start, end = chunk.payload.first, chunk.payload.start, chunk.payload.end
        with open_tar(chunk.source) as tar:
            for position, member in enumerate(members(tar, start, end), start=chunk.payload.first):
                if member.name.endswith(".json"):
                    yield self._member(tar, member, chunk.source, position)

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        return arranged(value, position, self.options, _named)

    def image_tars(self, sources: Sequence[Path]) -> list[Path]:
        return [path for path in sources if tarfile_like(path)]

    def _member(self, tar: int, member: Member, source: str, position: int) -> Conversation | Skipped:
        if member.length > MAX_DOCUMENT:
            return Skipped(member.name, position, f"has more than {MAX_DOCUMENT} bytes")
        data = read(tar, member)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return Skipped(member.name, position, "is no JSON")

        def placed(info: dict[str, Any]) -> ImageRef | None:
            return _embedded(info, data, member, source)

        return arranged(value, position, self.options, placed)


def arranged(
    value: Any, position: int, options: FormatOptions, place: Callable[[dict[str, Any]], ImageRef | None]
) -> Conversation | Skipped:
    """The document with its images before their sentences.

    Args:
        place: where the image of an "image_info" lies; None if it is not to be used.
    """
    url = value.get("url") if isinstance(value, dict) else None
    key: str = url if is_name(url) else str(position)
    parts = _parts(value)
    if isinstance(parts, str):
        return Skipped(key, position, parts)
    sentences, infos, similarity = parts
    images = [place(info) if isinstance(info, dict) else None for info in infos]
    usable = [i for i, image in enumerate(images) if image is not None]
    rows = similarity[usable]
    before = {
        column: images[usable[row]]
        for row, column in best_assignment(rows)
        if rows[row, column] >= options.min_similarity
    }
    ordered = [(before.get(i), sentence) for i, sentence in enumerate(sentences)]
    return document(key, position, ordered, options, between=" ")


def _parts(value: Any) -> tuple[list[str], list[Any], np.ndarray] | str:
    """Sentences, image infos and [images, sentences] similarities; or why the document has none."""
    if not isinstance(value, dict):
        return "is no JSON object"
    texts, infos, matrix = (value.get(name) for name in ("text_list", "image_info", "similarity_matrix"))
    sentences = [words(text) for text in texts] if isinstance(texts, list) else []
    if not sentences or None in sentences:
        return 'its "text_list" is no list of texts'
    if not isinstance(infos, list) or not isinstance(matrix, list) or len(infos) != len(matrix):
        return 'its "similarity_matrix" does not fit its "image_info"'
    if len(infos) > MAX_IMAGES or len(infos) * len(sentences) > MAX_CELLS:
        return f"has {len(infos)} images and {len(sentences)} sentences, too many to match"
    if not all(isinstance(row, list) and len(row) == len(sentences) for row in matrix):
        return 'its "similarity_matrix" does not fit its "text_list"'
    if not all(type(cell) in (float, int) for row in matrix for cell in row):
        return 'its "similarity_matrix" holds something else than numbers'
    try:
        numbers = np.array(matrix, np.float64).reshape(len(infos), len(sentences))
    except OverflowError:
        return 'its "similarity_matrix" is not finite'
    if not (np.abs(numbers) < 1e6).all():
        return 'its "similarity_matrix" is not finite'
    return sentences, infos, numbers  # type: ignore[return-value]


def _named(info: dict[str, Any]) -> ImageRef | None:
    """Of JSON lines: the image lies in a folder or tar, by its name or that of its URL."""
    names: list[str] = []
    if is_name(info.get("image_name")):
        names.append(info["image_name"])
    if is_name(info.get("raw_url")):
        names.extend(url_names(info["raw_url"]))
    return tuple(dict.fromkeys(names)) or None


def _embedded(info: dict[str, Any], data: bytes, member: Member, source: str) -> ImageRef | None:
    """Of a tar: the place of the text that is the image in base64."""
    text = info.get("image_base64")
    if not isinstance(text, str) or len(text) % 4 or not _BASE64.fullmatch(text):
        return None
    if (len(text) // 4 * 3 - text.count("=", -2)) // 1000 <= MIN_KILOBYTES:
        return None
    offset = data.find(b'"' + text.encode() + b'"')
    if offset < 0:
        raise InputError(
            f'{source}: {member.name}: "image_base64" is written with escapes (as \\/), so that the image '
            "cannot be read in place; write the JSON without them"
        )
    name = info["image_name"] if is_name(info.get("image_name")) else member.name
    return TarPlace(source, name, member.offset + offset + 1, len(text), "base64")
