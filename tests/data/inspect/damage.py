"""Datasets written sample by sample, so that they can hold what `megamm prepare` never writes."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from megamm.data import indexed
from megamm.data.image_store import Location, describe, index_tar
from megamm.data.manifest import TOKENIZER_FOLDER, Manifest, describe_files
from megamm.data.prepare_partial import Partial
from megamm.data.prepare_render import Found, Rendered
from megamm.data.prepare_writer import DatasetWriter
from megamm.data.sample_checksum import IMAGE_RECORD, content_crc
from megamm.data.token_file import token_dtype
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError


class Planted(NamedTuple):
    """A sample: token ids, which of them are learnt, and its images as (container, name)."""

    ids: list[int]
    learnt: list[int]
    images: Sequence[tuple[int, str]] = ()


def write_dataset(out: Path, samples: list[Planted], containers: list[Path], tokenizer: Tokenizer) -> Path:
    """A dataset of `samples`, whatever is wrong with them; its manifest agrees with its files."""
    stored = [describe(path) for path in containers]
    tars = {i: index_tar(path) for i, path in enumerate(containers) if path.is_file()}
    with Partial(out) as partial:
        done = partial.begin("planted", restart=True)
        tokenizer.save(partial.dataset / TOKENIZER_FOLDER)
        with DatasetWriter(partial, done, tokenizer.vocab_size) as writer:
            for sample in samples:
                images = [_entry(containers[number], number, name, tars) for number, name in sample.images]
                writer.write(_rendered(sample, images, tokenizer.vocab_size))
            writer.finish()
        partial.commit()
    manifest = Manifest(
        preparation="none",
        created_by="test",
        options={},
        instructions="none",
        image_checks="full",
        sources=["made.json"],
        source_format="llava",
        template="vicuna",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        image_id=tokenizer.image_id,
        counts=writer.counts,
        containers=[list(container) for container in stored],
    )
    own = [f"{TOKENIZER_FOLDER}/{path.name}" for path in (out / TOKENIZER_FOLDER).iterdir()]
    manifest.files = describe_files(out, [*indexed.FILES, *own])
    manifest.write(out)
    return out


def _rendered(sample: Planted, images: list[Found], vocab_size: int) -> Rendered:
    """One sample as the writer takes it."""
    tokens, learnt = np.array(sample.ids, token_dtype(vocab_size)), np.array(sample.learnt, np.uint8)
    records, names = np.zeros(len(images), IMAGE_RECORD), b""
    for record, (place, crc32, width, height) in zip(records, images, strict=True):
        names += place.name.encode()
        record["container"], record["crc32"], record["name_end"] = place.container, crc32, len(names)
        record["width"], record["height"] = width, height
        record["offset"], record["length"] = place.offset, place.length
    crc = content_crc(tokens, learnt, records, np.frombuffer(names, np.uint8))
    lengths, counts = np.array([len(tokens)], "<i4"), np.array([len(images)], "<i4")
    return Rendered(tokens, learnt, lengths, counts, np.array([crc], "<u4"), records, names, b"", 0, 0)


def _entry(container: Path, number: int, name: str, tars: dict[int, dict[str, tuple[int, int]]]) -> Found:
    if number in tars:
        offset, length = tars[number][name]
        data = container.read_bytes()[offset : offset + length]
    else:
        data = (container / name).read_bytes()
        offset, length = 0, len(data)
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except OSError:  # a file that is no image
        width = height = 1
    return Found(Location(number, name, offset, length), zlib.crc32(data), width, height)


def start_squares(killer: int) -> Callable[[Sequence[int]], list[int]]:
    """Work for a pool: squares; the number `killer` ends the process."""
    if killer < 0:
        raise InputError("no work below zero")

    def work(numbers: Sequence[int]) -> list[int]:
        if killer in numbers:
            os._exit(9)
        return [number * number for number in numbers]

    return work
