"""Writes the files of a dataset directory, sample by sample, in bounded memory."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from megamm.data import indexed
from megamm.data.prepare_workers import ImageEntry, Rendered
from megamm.data.token_file import index_bytes, token_dtype


class DatasetWriter:
    """A context manager; files are complete when it is left without an exception."""

    def __init__(self, directory: Path, vocab_size: int):
        self.directory = directory
        self.dtype = token_dtype(vocab_size)
        self.lengths: list[int] = []
        self.image_starts = [0]
        self.name_end = self.num_learnt = self.num_skipped = 0
        self._stack = ExitStack()
        self._files = {
            name: self._stack.enter_context((directory / name).open("wb")) for name in indexed.FILES
        }

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is None:
                self._files[indexed.TOKEN_INDEX].write(
                    index_bytes(np.array(self.lengths, np.int64), self.dtype)
                )
                self._files[indexed.IMAGE_STARTS].write(np.array(self.image_starts, "<i8").tobytes())

    def write(self, rendered: Rendered) -> None:
        """Append the samples and skipped entries of a chunk."""
        for tokens, learnt, images in zip(rendered.tokens, rendered.learnt, rendered.images, strict=True):
            self._files[indexed.TOKENS].write(tokens.astype(self.dtype).tobytes())
            self._files[indexed.LOSS_MASK].write(learnt.tobytes())
            self.lengths.append(len(tokens))
            self.num_learnt += int(learnt.sum())
            for image in images:
                self._write_image(image)
            self.image_starts.append(self.image_starts[-1] + len(images))
        for line in rendered.skipped:
            self._files[indexed.SKIPPED].write((json.dumps(line) + "\n").encode())
        self.num_skipped += len(rendered.skipped)

    def counts(self) -> dict[str, int]:
        """What was written."""
        return {
            "samples": len(self.lengths),
            "tokens": sum(self.lengths),
            "learnt_tokens": self.num_learnt,
            "images": self.image_starts[-1],
            "skipped": self.num_skipped,
        }

    def _write_image(self, image: ImageEntry) -> None:
        name = image.location.name.encode()
        self.name_end += len(name)
        place = image.location
        record = np.zeros((), indexed.IMAGE_RECORD)
        record["container"], record["offset"], record["length"] = place.container, place.offset, place.length
        record["crc32"], record["width"], record["height"] = image.crc32, image.width, image.height
        record["name_end"] = self.name_end
        self._files[indexed.IMAGES].write(record.tobytes())
        self._files[indexed.IMAGE_NAMES].write(name)
