"""Datasets of many sizes, written by the project's writer and read at random, and the memory of `megamm
prepare`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import prepare as preparing

from megamm import __version__
from megamm.data import indexed
from megamm.data.manifest import TOKENIZER_FOLDER, Manifest, describe_files
from megamm.data.prepare_partial import Partial
from megamm.data.prepare_render import Rendered
from megamm.data.prepare_writer import DatasetWriter
from megamm.data.sample_checksum import IMAGE_RECORD, content_crc
from megamm.data.token_file import token_dtype
from megamm.data.tokenizer import Tokenizer, train_tokenizer

TOKENS = 48  # of a sample, on average
CHUNK = 10_000  # samples that are handed to the writer at a time
AT_ONCE = 256  # samples that are read per call
VOCAB = 420


def make_tokenizer(folder: Path) -> Tokenizer:
    """A small one, as every dataset has one."""
    alphabet = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!'"
    return train_tokenizer([f"{a}{b} {b}{a}" for a in alphabet for b in alphabet], folder, VOCAB)


def chunk_of(count: int, dtype: np.dtype, draw: np.random.Generator) -> Rendered:
    """Samples of random tokens, the second half of each learnt."""
    lengths = draw.integers(TOKENS // 2, 2 * TOKENS - TOKENS // 2, count).astype("<i4")
    tokens = draw.integers(4, VOCAB, int(lengths.sum())).astype(dtype)
    ends = np.cumsum(lengths)
    places = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)
    learnt = (places >= np.repeat(lengths // 2, lengths)).astype("u1")
    none, no_names = np.zeros(0, IMAGE_RECORD), np.zeros(0, "u1")
    spans = zip((ends - lengths).tolist(), ends.tolist(), strict=True)
    crcs = [content_crc(tokens[a:b], learnt[a:b], none, no_names) for a, b in spans]
    return Rendered(
        *(tokens, learnt, lengths, np.zeros(count, "<i4"), np.array(crcs, "<u4")),
        *(none, b"", b"", 0, 0),
    )


def write_dataset(out: Path, samples: int, tokenizer: Tokenizer) -> Path:
    """A prepared dataset of text, as `megamm prepare` leaves it; the folder."""
    draw, left = np.random.default_rng(samples), samples
    with Partial(out) as partial:
        done = partial.begin("benchmark", restart=True)
        tokenizer.save(partial.dataset / TOKENIZER_FOLDER)
        with DatasetWriter(partial, done, tokenizer.vocab_size) as writer:
            while left:
                count = min(CHUNK, left)
                writer.write(chunk_of(count, token_dtype(tokenizer.vocab_size), draw))
                left -= count
            writer.finish()
            counts = writer.counts
        names = sorted(path.name for path in (partial.dataset / TOKENIZER_FOLDER).iterdir())
        files = [*indexed.FILES, *(f"{TOKENIZER_FOLDER}/{name}" for name in names)]
        Manifest(
            preparation="benchmark",
            created_by=f"megamm {__version__}",
            sources=[],
            source_format="text",
            options={},
            instructions="none",
            template="text",
            image_checks="none",
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            image_id=tokenizer.image_id,
            counts=counts,
            containers=[],
            files=describe_files(partial.dataset, files),
        ).write(partial.dataset)
        partial.commit()
    return out


def opening_seconds(path: Path, rounds: int) -> float:
    """Median seconds until a dataset in the page cache can be read."""
    times = []
    for turn in range(rounds + 1):  # the first one warms up
        started = time.perf_counter()
        indexed.PreparedDataset(path).close()
        if turn:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def reading_seconds(dataset: indexed.PreparedDataset, calls: int, rounds: int) -> float:
    """Median seconds of the processor for each of random samples, read and verified AT_ONCE at a time."""
    draw, times = np.random.default_rng(0), []
    for turn in range(rounds + 1):
        rows = draw.integers(0, len(dataset), (calls, AT_ONCE))
        started = time.process_time()
        for some in rows:
            dataset.samples(some)
        if turn:
            times.append((time.process_time() - started) / rows.size)
    return statistics.median(times)


def prepare_memory(folder: Path, samples: int, tokenizer: Path) -> int:
    """Most bytes of `megamm prepare` with one worker on so many conversations."""
    own = folder / str(samples)
    own.mkdir()
    names = preparing.write_pictures(own / "images")
    preparing.write_source(own / "source.json", samples, names)
    process = preparing.start(own, own / "out", tokenizer, 1, "header")
    _, _, most = preparing.watched(process)
    return most
