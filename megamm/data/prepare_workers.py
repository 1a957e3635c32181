"""The part of `megamm prepare` that runs in worker processes: render entries, look at their images."""

from __future__ import annotations

import multiprocessing
import signal
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megamm.config import ImageConfig
from megamm.data.conversation import Conversation, ImageRef
from megamm.data.image_header import ImageError, read_header
from megamm.data.image_store import Container, ImageStore, Location
from megamm.data.templates import Template
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError, RunError


class Entry(NamedTuple):
    """A conversation and, for each of its images, where it may lie (container, offset or -1, length)."""

    source: str
    conversation: Conversation
    candidates: list[list[tuple[int, int, int]]]


Chunk = list[Entry]


class ImageEntry(NamedTuple):
    """An image that was found: the fields of indexed.IMAGE_RECORD."""

    location: Location
    crc32: int
    width: int
    height: int


@dataclass
class Rendered:
    """A rendered chunk: lists with one item per sample that is kept, and the entries that were not."""

    tokens: list[np.ndarray] = field(default_factory=list)
    learnt: list[np.ndarray] = field(default_factory=list)
    images: list[list[ImageEntry]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class Renderer:
    """Renders chunks; one per process."""

    def __init__(self, tokenizer: Tokenizer, template: Template, containers: list[Container]):
        self.tokenizer, self.template = tokenizer, template
        self.store = ImageStore(containers)

    def render(self, chunk: Chunk) -> Rendered:
        """Raises InputError where a conversation does not fit the template."""
        rendered = Rendered()
        for entry in chunk:
            images = self._images(entry, rendered)
            if images is None:
                continue
            try:
                ids, mask = self.template.render(entry.conversation.turns, self.tokenizer)
            except InputError as error:
                where = f"{entry.source}: entry {entry.conversation.position + 1}"
                raise InputError(f"{where} (id {entry.conversation.key!r}): {error}") from None
            rendered.tokens.append(np.array(ids, np.int32))
            rendered.learnt.append(np.array(mask, np.uint8))
            rendered.images.append(images)
        return rendered

    def _images(self, entry: Entry, rendered: Rendered) -> list[ImageEntry] | None:
        found = []
        for name, candidates in zip(entry.conversation.images, entry.candidates, strict=True):
            try:
                found.append(self._look(name, candidates))
            except ImageError as error:
                rendered.skipped.append(
                    {
                        "source": entry.source,
                        "entry": entry.conversation.position + 1,
                        "id": entry.conversation.key,
                        "image": name,
                        "reason": str(error),
                    }
                )
                return None
        return found

    def _look(self, name: ImageRef, candidates: list[tuple[int, int, int]]) -> ImageEntry:
        location = self._locate(str(name), candidates)
        data = self.store.read(location)
        # The limit of the default recipe: a picture beyond it is refused here rather than in every epoch.
        header = read_header(data, ImageConfig().max_pixels)
        return ImageEntry(location, zlib.crc32(data), header.width, header.height)

    def _locate(self, name: str, candidates: list[tuple[int, int, int]]) -> Location:
        reason = ImageError("the file is missing")
        for container, offset, length in candidates:
            if offset >= 0:
                return Location(container, name, offset, length)
            try:
                return self.store.find(container, name)
            except ImageError as error:
                reason = error
        raise reason


def rendered_chunks(
    chunks: Iterator[Chunk],
    tokenizer: Tokenizer,
    template: Template,
    containers: list[Container],
    workers: int,
) -> Generator[Rendered, None, None]:
    """Render chunks in `workers` processes (one: in this process); results in the order of `chunks`."""
    if workers == 1:
        renderer = Renderer(tokenizer, template, containers)
        try:
            yield from map(renderer.render, chunks)
        finally:
            renderer.store.close()
        return
    # Spawned, not forked: this process may hold threads (torch, an image library) that do not survive a fork.
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.model, tokenizer.added_tokens, template.name, containers),
    )
    try:
        waiting: deque[Future[Rendered]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_render_in_worker, chunk))
            if len(waiting) > 2 * workers:  # bounds memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError("prepare: a worker process died; try fewer --workers or more memory") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_renderer: Renderer | None = None  # of this worker process


def _start_worker(model: bytes, added: dict[str, int], template: str, containers: list[Container]) -> None:
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the workers
    _renderer = Renderer(Tokenizer(model, added), Template.by_name(template), containers)


def _render_in_worker(chunk: Chunk) -> Rendered:
    assert _renderer is not None, "the initializer of the pool has run"
    return _renderer.render(chunk)
