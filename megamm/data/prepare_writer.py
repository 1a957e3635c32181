"""Appends rendered chunks to the files of a dataset directory; nothing grows in memory with them."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from megamm.data import indexed
from megamm.data.prepare_partial import Partial, Progress
from megamm.data.prepare_render import Rendered
from megamm.data.sample_checksum import at_rows
from megamm.data.token_file import token_dtype, write_index
from megamm.errors import RunError

LENGTHS = "lengths.bin"  # i32 per sample, until the index is written
JOURNAL_SECONDS = 5.0  # so much work is lost at most
COUNTS = ("samples", "text_only_samples", "tokens", "learnt_tokens", "images", "dropped_images", "skipped")
_APPENDED = [name for name in indexed.FILES if name != indexed.TOKEN_INDEX]


class DatasetWriter:
    """A context manager that goes on where the journal ends.

    Attributes:
        counts: of what was written.
        chunks: how many.
    """

    def __init__(self, partial: Partial, done: Progress, vocab_size: int):
        self.partial, self.dtype = partial, token_dtype(vocab_size)
        self.chunks = done.chunks
        self.counts = dict.fromkeys(COUNTS, 0) | done.counts
        self._stack = ExitStack()
        self._recorded = time.monotonic()
        with partial.writing():
            self._files = {name: self._open(name, done.sizes.get(name, 0)) for name in [*_APPENDED, LENGTHS]}
            if not done.chunks:
                self._append(indexed.IMAGE_STARTS, np.zeros(1, "<i8"))
        self._name_end = done.sizes.get(indexed.IMAGE_NAMES, 0)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def write(self, rendered: Rendered) -> None:
        """Append a chunk.

        Raises:
            RunError: the disk is full or fails; what the journal tells of stays.
        """
        counts = self.counts
        records = rendered.records.copy()
        records["name_end"] += self._name_end
        starts = counts["images"] + np.cumsum(rendered.num_images, dtype="<i8")
        with self.partial.writing():
            self._append(indexed.TOKENS, rendered.tokens)
            self._append(indexed.LOSS_MASK, rendered.learnt)
            self._append(indexed.CHECKSUMS, at_rows(rendered.crcs, counts["samples"]))
            self._append(indexed.IMAGE_STARTS, starts)
            self._append(indexed.IMAGES, records)
            self._append(indexed.IMAGE_NAMES, np.frombuffer(rendered.names, np.uint8))
            self._append(indexed.SKIPPED, np.frombuffer(rendered.skipped, np.uint8))
            self._append(LENGTHS, rendered.lengths)
            self._name_end += len(rendered.names)
            counts["samples"] += len(rendered.lengths)
            counts["text_only_samples"] += int((rendered.num_images == 0).sum())
            counts["tokens"] += len(rendered.tokens)
            counts["learnt_tokens"] += int(rendered.learnt.sum())
            counts["images"] += len(records)
            counts["dropped_images"] += rendered.dropped_images
            counts["skipped"] += rendered.num_skipped
            self.chunks += 1
            if time.monotonic() - self._recorded >= JOURNAL_SECONDS:
                self._record()

    def finish(self) -> None:
        """Write what is known at the end only; raises RunError as `write` does."""
        with self.partial.writing():
            self._record()
            path, lengths = self.partial.dataset / indexed.TOKEN_INDEX, self.partial.path / LENGTHS
            with open(path, "wb") as index, open(lengths, "rb") as file:
                write_index(index, file, self.counts["samples"], self.dtype)
                index.flush()
                os.fsync(index.fileno())

    def _record(self) -> None:
        for descriptor in self._files.values():
            os.fsync(descriptor)
        sizes = {name: os.lseek(descriptor, 0, os.SEEK_CUR) for name, descriptor in self._files.items()}
        self.partial.record(Progress(self.chunks, sizes, self.counts))
        self._recorded = time.monotonic()

    def _open(self, name: str, size: int) -> int:
        """The descriptor of a file that is cut behind its first `size` bytes."""
        path: Path = (self.partial.path if name == LENGTHS else self.partial.dataset) / name
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._stack.callback(os.close, descriptor)
        if os.fstat(descriptor).st_size < size:
            raise RunError(
                f"{self.partial.path}: is damaged; run `megamm prepare` with --restart to begin anew"
            )
        os.ftruncate(descriptor, size)
        os.lseek(descriptor, 0, os.SEEK_END)
        return descriptor

    def _append(self, name: str, values: np.ndarray) -> None:
        data = memoryview(values.tobytes())
        while data:  # a disk that gets full takes a part first
            data = data[os.write(self._files[name], data) :]
