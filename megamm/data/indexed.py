"""A prepared dataset: random access to tokens, loss masks and the places of images.

A directory of:
    tokens.bin, tokens.idx   ids of all samples, one image token per image (layout: token_file.py)
    loss_mask.bin            u8 per token: 1 where it is learnt
    image_starts.bin         i64 [samples + 1]: sample i has the image records starts[i] ... starts[i+1]-1
    images.bin               one IMAGE_RECORD per image, in the order of the placeholders
    image_names.bin          UTF-8 names of all images back to back
    checksums.bin            u32 per sample (layout: sample_checksum.py)
    skipped.jsonl            entries that were left out, with their reasons
    tokenizer/               the tokenizer that made the ids
    manifest.json            written last; see manifest.py
Everything is mapped into memory. Opening compares sizes and hashes the small files, so it takes as long for
any number of samples; the checksum of a sample is verified whenever it is read.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megamm.data.image_header import ImageError, check_length
from megamm.data.image_store import Container, ImageStore, Location, safe_name
from megamm.data.manifest import TOKENIZER_FOLDER, Manifest
from megamm.data.sample_checksum import IMAGE_RECORD, at_row, content_crc, content_crcs, of_rows
from megamm.data.samples import Samples
from megamm.data.token_file import REMEDY, TokenFile, map_file, token_dtype
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.ops.documents import Stretches, as_tensor

TOKENS, TOKEN_INDEX, LOSS_MASK = "tokens.bin", "tokens.idx", "loss_mask.bin"
IMAGE_STARTS, IMAGES, IMAGE_NAMES = "image_starts.bin", "images.bin", "image_names.bin"
CHECKSUMS, SKIPPED = "checksums.bin", "skipped.jsonl"
FILES = [TOKENS, TOKEN_INDEX, LOSS_MASK, IMAGE_STARTS, IMAGES, IMAGE_NAMES, CHECKSUMS, SKIPPED]

HASH_LIMIT = 1 << 26  # bytes that opening hashes, of the smallest files; `check` hashes all


class Sample(NamedTuple):
    """One sample as stored: ids [n], learnt [n] (u8), and the rows of its image records."""

    tokens: np.ndarray
    learnt: np.ndarray
    images: range


class PreparedDataset:
    """A dataset directory opened for reading; may be used by several threads.

    Attributes:
        manifest: what the dataset says of itself.
        store: where its images are read.
        tokens, learnt: ids and loss mask (u8) of all samples back to back; `starts` tells whose they are.
            They are what the files hold, not verified.
    """

    def __init__(self, directory: str | Path, verify: bool = True):
        """Open and check `directory`.

        Args:
            verify: False: only that the files fit together, so that what is damaged can be looked at.

        Raises:
            InputError: it is no dataset, is damaged, or its images are gone.
        """
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        files = [name for name in self.manifest.files if not name.startswith(f"{TOKENIZER_FOLDER}/")]
        if sorted(files) != sorted(FILES):
            raise InputError(f"{self.directory}: its manifest names other files than expected; {REMEDY}")
        if verify:
            self.manifest.check_files(self.directory, HASH_LIMIT)
        self._index = TokenFile(self.directory / TOKENS, self.directory / TOKEN_INDEX)
        self.tokens = self._index.tokens
        self.learnt = self._map(LOSS_MASK, np.dtype("u1"))
        self._image_starts = self._map(IMAGE_STARTS, np.dtype("<i8"))
        self._images = self._map(IMAGES, IMAGE_RECORD)
        self._names = self._map(IMAGE_NAMES, np.dtype("u1"))
        self._checksums = self._map(CHECKSUMS, np.dtype("<u4"))
        self._check_counts()
        self._flat = as_tensor(self.tokens), as_tensor(self.learnt)
        self._flat_names = as_tensor(self._names)
        self.store = ImageStore([Container(*entry) for entry in self.manifest.containers])
        if verify:
            self.store.check()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_images(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Sample:
        """Sample `row`, verified; raises InputError where it is damaged, IndexError if there is none."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start, end = self._index.span(row)
        first, last = int(self._image_starts[row]), int(self._image_starts[row + 1])
        sample = Sample(self.tokens[start:end], self.learnt[start:end], range(first, last))
        if not 0 <= first <= last <= self.num_images or self._crc(sample) != at_row(
            int(self._checksums[row]), row
        ):
            raise InputError(f"{self.directory}: sample {row} is damaged; run `megamm prepare` again")
        return sample

    def samples(self, rows: np.ndarray) -> Samples:
        """The samples `rows` [n], verified: much cheaper than one by one.

        Raises:
            InputError: one of them is damaged. IndexError: there is none of that number.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows up to {rows.max()} of {len(self)}")
        starts, ends = self._index.spans(rows)
        first, last = self._image_starts[rows], self._image_starts[rows + 1]
        good = (first >= 0) & (first <= last) & (last <= self.num_images) & (last - first <= ends - starts)
        found = Samples(
            Stretches(*self._flat, torch.from_numpy(starts), torch.from_numpy(ends)),
            np.where(good, first, 0),
            np.where(good, last - first, 0),
        )
        wrong = content_crcs(found, self._images, self._flat_names) != of_rows(self._checksums[rows], rows)
        if (wrong | ~good).any():
            row = rows[np.flatnonzero(wrong | ~good)[0]]
            raise InputError(f"{self.directory}: sample {row} is damaged; run `megamm prepare` again")
        return found

    def starts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the samples `rows` [n] lie in `tokens` and `learnt`: the first and behind the last, both [n].

        Raises:
            InputError: the index is damaged there.
        """
        return self._index.spans(rows)

    def sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored tokens (an image counts as one) and images of the samples `rows` [n]: [n] int64 each.

        Raises:
            InputError: the index is damaged there.
        """
        starts, ends = self._index.spans(rows)
        images = self._image_starts[rows + 1] - self._image_starts[rows]
        if ((images < 0) | (images > ends - starts)).any():
            raise InputError(f"{self.directory / IMAGE_STARTS}: holds impossible numbers of images; {REMEDY}")
        return ends - starts, images

    def image_sizes(self, images: range) -> np.ndarray:
        """Width and height in pixels of the images of these records, 0 where they were not looked at: [n, 2]
        int64."""
        records = self._images[images.start : images.stop]
        return np.stack([records["width"], records["height"]], axis=1).astype(np.int64)

    def location(self, image: int) -> Location:
        """Where the bytes of an image lie; raises InputError where its sample is damaged."""
        row = int(np.searchsorted(self._image_starts, image, side="right")) - 1
        if not 0 <= image < self.num_images:
            raise IndexError(f"image {image} of {self.num_images}")
        if not 0 <= row < len(self) or image not in self[row].images:
            raise InputError(f"{self.directory / IMAGE_STARTS}: holds impossible numbers of images; {REMEDY}")
        return self._location(image)

    def locations(self, sample: Sample) -> list[Location]:
        """Where the bytes of the images of a sample lie that was read, and so verified."""
        return [self._location(image) for image in sample.images]

    def read_image(self, image: int) -> bytes:
        """The encoded bytes of an image. They are compared with their crc32 if `megamm prepare` has read
        them (--image-checks full).

        Raises:
            ImageError: they cannot be read, or are not those that were prepared.
            InputError: its sample is damaged.
        """
        location = self.location(image)
        if safe_name(location.name) is None and self.store.containers[location.container].kind == "folder":
            raise ImageError("the path leaves the image folder")
        check_length(location.length)
        data = self.store.read(location)
        crc = int(self._images[image]["crc32"])
        if crc and zlib.crc32(data) != crc:
            raise ImageError("has changed since `megamm prepare`")
        return data

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids; raises InputError where its files are damaged."""
        own = [name for name in self.manifest.files if name.startswith(f"{TOKENIZER_FOLDER}/")]
        self.manifest.check_hashes(self.directory, own)
        return Tokenizer.load(self.directory / TOKENIZER_FOLDER)

    def check(self) -> None:
        """Compare every byte of the directory with the manifest; raises InputError."""
        self.manifest.check_files(self.directory, None)

    def close(self) -> None:
        """Close the tar files that are open."""
        self.store.close()

    def _map(self, name: str, dtype: np.dtype) -> np.ndarray:
        path = self.directory / name
        if path.stat().st_size % dtype.itemsize:
            raise InputError(f"{path}: does not hold whole records; {REMEDY}")
        return map_file(path, dtype)

    def _check_counts(self) -> None:
        counts, samples = self.manifest.counts, len(self)
        good = {
            TOKEN_INDEX: samples > 0 and samples == counts.get("samples"),
            TOKENS: len(self.tokens) == counts.get("tokens")
            and self.tokens.dtype == token_dtype(self.manifest.vocab_size),
            LOSS_MASK: len(self.learnt) == len(self.tokens),
            IMAGE_STARTS: len(self._image_starts) == samples + 1,
            IMAGES: len(self._images) == counts.get("images"),
            IMAGE_NAMES: len(self._names) == self._name_start(len(self._images)),
            CHECKSUMS: len(self._checksums) == samples,
        }
        for name, fine in good.items():
            if not fine:
                raise InputError(f"{self.directory / name}: contradicts the rest of the dataset; {REMEDY}")

    def _name_start(self, image: int) -> int:
        """Where the name of an image starts in image_names.bin."""
        return int(self._images["name_end"][image - 1]) if image else 0

    def _location(self, image: int) -> Location:
        record = self._images[image]
        name = self._names[self._name_start(image) : int(record["name_end"])].tobytes()
        return Location(
            int(record["container"]),
            name.decode("utf-8", "surrogateescape"),
            int(record["offset"]),
            int(record["length"]),
        )

    def _crc(self, sample: Sample) -> int:
        """The content crc of a sample as the files have it; -1 if its names cannot be where it says."""
        if not sample.images:
            return content_crc(sample.tokens, sample.learnt, self._images[:0], self._names[:0])
        records = self._images[sample.images.start : sample.images.stop].copy()
        start, end = self._name_start(sample.images.start), int(records["name_end"][-1])
        if (
            not 0 <= start <= end <= len(self._names)
            or (records["container"] >= len(self.store.containers)).any()
        ):
            return -1
        records["name_end"] -= start
        return content_crc(sample.tokens, sample.learnt, records, self._names[start:end])
