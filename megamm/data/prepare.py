"""`megamm prepare`: conversations and the places of their images become a dataset directory.

The bytes written depend on the sources, images, tokenizer and template alone, not on the number of
worker processes: entries are rendered in chunks of fixed size and written in the order of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from megamm.data import indexed
from megamm.data.conversation import Conversation
from megamm.data.formats import Format, make_format
from megamm.data.image_store import Container, describe, index_tar, safe_name
from megamm.data.manifest import Manifest, describe_files, file_sha256
from megamm.data.prepare_workers import Chunk, Entry, Rendered, rendered_chunks
from megamm.data.prepare_writer import DatasetWriter
from megamm.data.templates import Template
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.errors import InputError, RunError


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        counts: samples, tokens, learnt_tokens, images and skipped entries of the dataset.
        skipped_path: its list of skipped entries.
        up_to_date: the dataset was there already and nothing was written.
    """

    out: Path
    counts: dict[str, int]
    skipped_path: Path
    up_to_date: bool

    def summary(self) -> str:
        """A few words for the terminal."""
        counts = self.counts
        text = (
            f"{self.out}: {counts['samples']} samples, {counts['images']} images, {counts['tokens']} tokens "
            f"({counts['learnt_tokens']} learnt)"
        )
        if self.up_to_date:
            text += ", up to date"
        if counts["skipped"]:
            text += f"; {counts['skipped']} entries skipped for their images, see {self.skipped_path}"
        return text


def prepare(
    sources: list[Path],
    format: str,
    out: Path,
    tokenizer: Path,
    images: list[Path],
    template: str,
    workers: int,
) -> PrepareReport:
    """Write the dataset directory `out` from conversation files.

    Entries whose images are missing or unreadable are skipped and listed in out/skipped.jsonl. The
    directory appears complete or not at all. Where it exists already from the same sources, images
    and options, nothing is done.

    Args:
        sources: conversation files, read in this order.
        format: of the sources, a name in `megamm.data.formats`.
        images: folders and uncompressed tar files that hold the images; a name is looked up in each,
            the first that has it counts. If empty, images lie beside the source that names them.
        workers: processes that render and check; any number gives the same bytes.

    Raises:
        InputError: wrong sources, options or images, or `out` holds something else.
        RunError: the disk is full or not writable.
    """
    out = Path(out)
    if workers < 1:
        raise InputError(f"workers: is {workers}; give 1 or more")
    read, words = make_format(format), Template.by_name(template)
    vocabulary = Tokenizer.load(tokenizer)
    sources = _existing(sources)
    containers = [describe(path) for path in images] or _beside(sources)
    manifest = Manifest(
        preparation="",
        sources=[str(path) for path in sources],
        source_format=format,
        template=words.name,
        tokenizer_sha256=vocabulary.sha256,
        vocab_size=vocabulary.vocab_size,
        image_id=vocabulary.image_id,
        counts={},
        containers=[list(container) for container in containers],
    )
    manifest.preparation = _preparation(manifest, sources)
    if out.exists():
        return _same_or_refuse(out, manifest.preparation)
    places = _Places(containers, per_source=not images)
    chunks = _chunks(read, sources, places)
    rendered = rendered_chunks(chunks, vocabulary, words, containers, workers)
    return _write(out, rendered, manifest, vocabulary)


def train_tokenizer_from_sources(
    sources: list[Path], format: str, out: Path, vocab_size: int, template: str
) -> Tokenizer:
    """Train a tokenizer of `vocab_size` ids on the rendered conversations of the sources, so that the
    words of the template become pieces too, and save it in the directory `out`.

    Raises:
        InputError: wrong sources, or a vocabulary that does not fit them.
    """
    read, words = make_format(format), Template.by_name(template)
    texts = (
        segment.text
        for conversation in read.conversations(_existing(sources))
        for segment in words.segments(conversation.turns)
    )
    return train_tokenizer(texts, out, vocab_size)


class _Places:
    """Where each image may lie; tars are looked up here, folders by the workers."""

    def __init__(self, containers: list[Container], per_source: bool):
        self.containers = containers
        self.per_source = per_source
        self.tars = {i: index_tar(Path(c.path)) for i, c in enumerate(containers) if c.kind == "tar"}

    def candidates(self, name: str, source: int) -> list[tuple[int, int, int]]:
        """(container, offset, length), best first; offset -1 for a folder that has yet to be asked."""
        if self.per_source:
            return [(source, -1, 0)]
        found = []
        for number in range(len(self.containers)):
            if number not in self.tars:
                found.append((number, -1, 0))
            elif (place := self.tars[number].get(safe_name(name) or "")) is not None:
                found.append((number, *place))
                break
        return found


def _chunks(read: Format, sources: list[Path], places: _Places) -> Iterator[Chunk]:
    """Entries of all sources, by CHUNK_ENTRIES."""
    for piece in read.chunks(sources):
        chunk: Chunk = []
        for conversation in read.read(piece):
            if isinstance(conversation, Conversation):
                names = [name for name in conversation.images if isinstance(name, str)]
                candidates = [places.candidates(name, piece.source_number) for name in names]
                chunk.append(Entry(piece.source, conversation, candidates))
        yield chunk


def _write(
    out: Path, rendered: Generator[Rendered, None, None], manifest: Manifest, vocabulary: Tokenizer
) -> PrepareReport:
    """Write all files beside `out` and rename the directory when it is complete."""
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        with closing(rendered), DatasetWriter(partial, vocabulary.vocab_size) as writer:
            for piece in rendered:
                writer.write(piece)
        manifest.counts = writer.counts()
        if not manifest.counts["samples"]:
            first = (partial / indexed.SKIPPED).read_text(encoding="utf-8").splitlines()[0]
            raise InputError(
                f"{manifest.sources[0]}: every entry was skipped for its images, the first being {first}; "
                "check the folders or tar files given as images"
            )
        manifest.files = describe_files(partial, indexed.FILES)
        manifest.write(partial)
        partial.rename(out)
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error}); free or choose another disk") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return PrepareReport(out, manifest.counts, out / indexed.SKIPPED, up_to_date=False)


def _same_or_refuse(out: Path, preparation: str) -> PrepareReport:
    refusal = InputError(f"{out}: exists and was prepared otherwise; remove it or choose another --out")
    try:
        found = Manifest.read(out)
    except InputError:
        raise refusal from None
    if found.preparation != preparation:
        raise refusal
    try:
        found.check_files(out, indexed.HASH_LIMIT)
    except InputError:
        raise InputError(f"{out}: is damaged; remove it and run `megamm prepare` again") from None
    return PrepareReport(out, found.counts, out / indexed.SKIPPED, up_to_date=True)


def _existing(sources: list[Path]) -> list[Path]:
    if not sources:
        raise InputError("sources: none given; name at least one conversation file")
    for path in sources:
        if not Path(path).is_file():
            raise InputError(f"{path}: there is no such file; name a conversation file")
    return [Path(path) for path in sources]


def _beside(sources: list[Path]) -> list[Container]:
    return [describe(source.parent) for source in sources]


def _preparation(manifest: Manifest, sources: list[Path]) -> str:
    """Hash of everything that decides the contents of the dataset."""
    parts = {
        "sources": [file_sha256(path) for path in sources],
        "names": manifest.sources,
        "format": manifest.source_format,
        "template": manifest.template,
        "tokenizer": manifest.tokenizer_sha256,
        "containers": manifest.containers,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
