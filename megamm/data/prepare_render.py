"""One chunk of a source rendered: entries read, put into words and ids, their images found and looked at."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megamm.config import ImageConfig
from megamm.data.conversation import Conversation, ImageRef, Skipped, TarPlace
from megamm.data.formats import Chunk, FormatOptions, make_format
from megamm.data.image_header import Header, ImageError, read_header
from megamm.data.image_places import ImagePlaces
from megamm.data.image_store import Container, ImageStore, Location
from megamm.data.instructions import apply
from megamm.data.sample_checksum import IMAGE_RECORD, content_crc
from megamm.data.templates import Template, Turn
from megamm.data.token_file import token_dtype
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError

IMAGE_CHECKS = ("full", "header", "none")
HEAD_BYTES = 1 << 14  # of an image, in which its size usually stands
MAX_PIXELS = ImageConfig().max_pixels  # of the default recipe: refused here rather than in every epoch


class Found(NamedTuple):
    """An image that was found: fields of IMAGE_RECORD."""

    location: Location
    crc32: int
    width: int
    height: int


class Rendered(NamedTuple):
    """A rendered chunk, ready to be appended to the files of a dataset.

    Attributes:
        tokens, learnt: of all its samples back to back, in the stored types.
        lengths, num_images, crcs: [samples] i32, i32, u32 (sample_checksum.content_crc).
        records: IMAGE_RECORD [images], name_end counted from the start of `names`.
        names: of the images, back to back.
        skipped: lines of skipped.jsonl.
        num_skipped: how many.
        dropped_images: of documents that were kept without them.
    """

    tokens: np.ndarray
    learnt: np.ndarray
    lengths: np.ndarray
    num_images: np.ndarray
    crcs: np.ndarray
    records: np.ndarray
    names: bytes
    skipped: bytes
    num_skipped: int
    dropped_images: int


@dataclass(frozen=True)
class Sight:
    """Where images may lie.

    Attributes:
        containers: of the dataset.
        searched: containers in which names are looked up, in this order; empty: beside the source.
        beside: container of the folder of each source, where `searched` is empty.
        index: directory with the index of the tars among `searched`; None if there are none.
    """

    containers: list[Container]
    searched: list[int]
    beside: list[int]
    index: Path | None = None

    def searched_tars(self) -> list[tuple[int, str]]:
        """Numbers and paths of the tars in which names are looked up."""
        found = [(number, self.containers[number]) for number in self.searched]
        return [(number, container.path) for number, container in found if container.kind == "tar"]

    def of(self, directory: Path) -> Sight:
        """With the index that was written into `directory`, if there are tars to search."""
        return replace(self, index=directory) if self.searched_tars() else self


@dataclass(frozen=True)
class Renderer:
    """Renders chunks; picklable, what it needs is opened in the process that uses it.

    Attributes:
        tokenizer_path: of a tokenizer.
        image_checks: of IMAGE_CHECKS: "full" reads every image, "header" its beginning, "none" nothing.
    """

    format: str
    options: FormatOptions
    tokenizer_path: Path
    template_name: str
    instructions: str
    sight: Sight
    image_checks: str

    def __call__(self, chunk: Chunk) -> Rendered:
        """Raises InputError where an entry is wrong or does not fit the template."""
        building = _Building()
        for entry in self._reader.read(chunk):
            if isinstance(entry, Skipped):
                building.skip(chunk, entry, None, entry.reason)
                continue
            try:
                self._add(building, chunk, apply(self.instructions, entry))
            except ImageError as error:
                building.skip(chunk, entry, getattr(error, "image", None), str(error))
            except InputError as error:
                where = f"{chunk.source}: entry {entry.position + 1} (id {entry.key!r})"
                raise InputError(f"{where}: {error}") from None
        return building.rendered(token_dtype(self._tokenizer.vocab_size))

    def _add(self, building: _Building, chunk: Chunk, entry: Conversation) -> None:
        images: list[Found] = []
        missing: list[int] = []
        document = entry.turns[0].role == "document"
        for number, image in enumerate(entry.images):
            try:
                images.append(self._look(image, chunk.source_number))
            except ImageError as error:
                missing.append(number)
                if not document or len(missing) == len(entry.images):
                    error.image = _shown(image)  # type: ignore[attr-defined]
                    raise
        turns = [_without_images(entry.turns[0], missing)] if missing else entry.turns
        ids, mask = self._template.render(turns, self._tokenizer)
        if ids.count(self._tokenizer.image_id) != len(images):
            raise InputError(f"has other images than {IMAGE_TOKEN} placeholders; write one for every image")
        if not any(mask):
            building.skip(chunk, entry, None, f"holds nothing that the template {self.template_name} learns")
            return
        building.add(ids, mask, images, len(missing))

    def _look(self, image: ImageRef, source: int) -> Found:
        location = self._locate(image, source)
        if self.image_checks == "none":
            return Found(location, 0, 0, 0)
        if self.image_checks == "header":
            header = self._header(location)
            return Found(location, 0, header.width, header.height)
        data = self._store.read(location)
        header = read_header(data, MAX_PIXELS)
        return Found(location, zlib.crc32(data), header.width, header.height)

    def _header(self, location: Location) -> Header:
        head = self._store.head(location, HEAD_BYTES)
        try:
            return read_header(head, MAX_PIXELS)
        except ImageError:  # it may lie behind a colour profile or a preview
            return read_header(self._store.read(location), MAX_PIXELS)

    def _locate(self, image: ImageRef, source: int) -> Location:
        if isinstance(image, TarPlace):
            kind = "base64" if image.encoding == "base64" else "tar"
            number = self._tars[os.path.abspath(image.tar), kind]
            return Location(number, image.name, image.offset, image.length)
        problem = ImageError("the file is missing")
        for name in (image,) if isinstance(image, str) else image:
            try:
                return self._by_name(name, source)
            except ImageError as error:
                problem = error
        raise problem

    def _by_name(self, name: str, source: int) -> Location:
        """The first of the places that has it."""
        place = self._places.find(name) if self._places else None
        problem = ImageError("the file is missing")
        for number in self.sight.searched or [self.sight.beside[source]]:
            if place is not None and place.container == number:
                return Location(number, name, place.offset, place.length)
            if self.sight.containers[number].kind == "folder":
                try:
                    return self._store.find(number, _below(self.sight.containers[number].path, name))
                except ImageError as error:
                    problem = error
        raise problem

    @cached_property
    def _reader(self) -> Any:
        return make_format(self.format, self.options)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.tokenizer_path)

    @cached_property
    def _template(self) -> Template:
        return Template.by_name(self.template_name)

    @cached_property
    def _store(self) -> ImageStore:
        return ImageStore(self.sight.containers)

    @cached_property
    def _places(self) -> ImagePlaces | None:
        return ImagePlaces(self.sight.index) if self.sight.index else None

    @cached_property
    def _tars(self) -> dict[tuple[str, str], int]:
        return {(c.path, c.kind): number for number, c in reversed(list(enumerate(self.sight.containers)))}

    def close(self) -> None:
        """Close the tar files that are open."""
        self._store.close()


class _Building:
    """Collects the samples of a chunk."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.lengths: list[int] = []
        self.num_images: list[int] = []
        self.images: list[Found] = []
        self.skipped: list[str] = []
        self.dropped_images = 0

    def add(self, ids: list[int], mask: list[bool], images: list[Found], dropped: int) -> None:
        self.ids += ids
        self.mask += mask
        self.lengths.append(len(ids))
        self.num_images.append(len(images))
        self.images += images
        self.dropped_images += dropped

    def skip(self, chunk: Chunk, entry: Conversation | Skipped, image: str | None, reason: str) -> None:
        line = {"source": chunk.source, "entry": entry.position + 1, "id": entry.key, "image": image}
        self.skipped.append(json.dumps(line | {"reason": reason}) + "\n")

    def rendered(self, dtype: np.dtype) -> Rendered:
        tokens, learnt = np.array(self.ids, dtype), np.array(self.mask, np.uint8)
        lengths, num_images = np.array(self.lengths, "<i4"), np.array(self.num_images, "<i4")
        names = [image.location.name.encode("utf-8", "surrogateescape") for image in self.images]
        records = np.zeros(len(self.images), IMAGE_RECORD)
        for key in ("container", "offset", "length"):
            records[key] = [getattr(image.location, key) for image in self.images]
        for key in ("crc32", "width", "height"):
            records[key] = [getattr(image, key) for image in self.images]
        records["name_end"] = np.cumsum([len(name) for name in names])
        blob = b"".join(names)
        return Rendered(
            tokens,
            learnt,
            lengths,
            num_images,
            self._crcs(tokens, learnt, records, np.frombuffer(blob, np.uint8)),
            records,
            blob,
            "".join(self.skipped).encode(),
            len(self.skipped),
            self.dropped_images,
        )

    def _crcs(
        self, tokens: np.ndarray, learnt: np.ndarray, records: np.ndarray, names: np.ndarray
    ) -> np.ndarray:
        crcs, start, image, name = [], 0, 0, 0
        for length, count in zip(self.lengths, self.num_images, strict=True):
            own = records[image : image + count].copy()
            name_end = int(own["name_end"][-1]) if count else name
            own["name_end"] -= name
            end = start + length
            crcs.append(content_crc(tokens[start:end], learnt[start:end], own, names[name:name_end]))
            start, image, name = end, image + count, name_end
        return np.array(crcs, "<u4")


def _below(folder: str, name: str) -> str:
    """The name within the folder of a file that is given by its whole path."""
    return name[len(folder) + 1 :] if name.startswith(f"{folder}/") else name


def _shown(image: ImageRef) -> str:
    """An image, for skipped.jsonl."""
    return image if isinstance(image, str) else image.name if isinstance(image, TarPlace) else image[0]


def _without_images(turn: Turn, missing: list[int]) -> Turn:
    """A document without some of its placeholders."""
    first, *others = turn.text.split(IMAGE_TOKEN)
    kept = [("" if i in missing else IMAGE_TOKEN) + text for i, text in enumerate(others)]
    return Turn(turn.role, first + "".join(kept))
