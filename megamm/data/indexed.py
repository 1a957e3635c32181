"""A prepared dataset: random access to tokens, loss masks and the places of images.

A directory of:
    tokens.bin, tokens.idx   ids of all samples, one image token per image (layout: token_file.py)
    loss_mask.bin            u8 per token: 1 where it is learnt
    image_starts.bin         i64 [samples + 1]: sample i has the image records starts[i] ... starts[i+1]-1
    images.bin               one IMAGE_RECORD per image, in the order of the placeholders
    image_names.bin          UTF-8 names of all images back to back
    skipped.jsonl            entries that were left out, with their reasons
    manifest.json            written last; see manifest.py
Everything is mapped into memory; opening checks sizes, structure and (small files) hashes.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamm.data.image_header import ImageError
from megamm.data.image_store import MAX_IMAGE_BYTES, Container, ImageStore, Location, safe_name
from megamm.data.manifest import Manifest
from megamm.data.token_file import REMEDY, TokenFile, map_file, token_dtype
from megamm.errors import InputError

TOKENS, TOKEN_INDEX, LOSS_MASK = "tokens.bin", "tokens.idx", "loss_mask.bin"
IMAGE_STARTS, IMAGES, IMAGE_NAMES = "image_starts.bin", "images.bin", "image_names.bin"
SKIPPED = "skipped.jsonl"
FILES = [TOKENS, TOKEN_INDEX, LOSS_MASK, IMAGE_STARTS, IMAGES, IMAGE_NAMES, SKIPPED]

IMAGE_RECORD = np.dtype(
    [
        ("container", "<u4"),  # position in the manifest's list
        ("crc32", "<u4"),  # of the encoded bytes, so that a changed image is noticed
        ("width", "<u4"),
        ("height", "<u4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("name_end", "<i8"),  # end of its name in image_names.bin; it starts where the last one ends
    ]
)
# Opening hashes files up to this many bytes (half a second each); `check` hashes all.
HASH_LIMIT = 1 << 30


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
    """

    def __init__(self, directory: str | Path):
        """Open and check `directory`.

        Raises:
            InputError: it is no dataset, is damaged, or its images are gone.
        """
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        if sorted(self.manifest.files) != sorted(FILES):
            raise InputError(f"{self.directory}: its manifest names other files than expected; {REMEDY}")
        self.manifest.check_files(self.directory, HASH_LIMIT)
        self._tokens = TokenFile(self.directory / TOKENS, self.directory / TOKEN_INDEX)
        self._learnt = self._map(LOSS_MASK, np.dtype("u1"))
        self._image_starts = self._map(IMAGE_STARTS, np.dtype("<i8"))
        self._images = self._map(IMAGES, IMAGE_RECORD)
        self._names = self._map(IMAGE_NAMES, np.dtype("u1"))
        self._check_structure()
        self.store = ImageStore([Container(*entry) for entry in self.manifest.containers])
        self.store.check()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def num_images(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> Sample:
        start, end = self._tokens.starts[row], self._tokens.starts[row + 1]
        images = range(int(self._image_starts[row]), int(self._image_starts[row + 1]))
        return Sample(self._tokens[row], self._learnt[start:end], images)

    def sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored tokens (an image counts as one) and images of the samples `rows` [n]: [n] int64 each."""
        starts, images = self._tokens.starts, self._image_starts
        return starts[rows + 1] - starts[rows], images[rows + 1] - images[rows]

    def location(self, image: int) -> Location:
        """Where the bytes of an image lie."""
        record = self._images[image]
        start = int(self._images["name_end"][image - 1]) if image else 0
        name = self._names[start : int(record["name_end"])].tobytes().decode("utf-8", "replace")
        return Location(int(record["container"]), name, int(record["offset"]), int(record["length"]))

    def read_image(self, image: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            ImageError: they cannot be read, or are not those that were prepared.
        """
        location = self.location(image)
        if safe_name(location.name) is None:
            raise ImageError("the path leaves the image folder")
        data = self.store.read(location)
        if zlib.crc32(data) != self._images["crc32"][image]:
            raise ImageError("has changed since `megamm prepare`")
        return data

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

    def _check_structure(self) -> None:
        samples, images = len(self._tokens), self._images
        counts = {"samples": samples, "images": len(images), "tokens": int(self._tokens.starts[-1])}
        for name, count in counts.items():
            if self.manifest.counts.get(name) != count:
                raise InputError(
                    f"{self.directory}: the manifest counts other {name} than there are; {REMEDY}"
                )
        starts, names = self._image_starts, images["name_end"]
        good = {
            TOKEN_INDEX: samples > 0 and self._tokens.dtype == token_dtype(self.manifest.vocab_size),
            LOSS_MASK: len(self._learnt) == counts["tokens"],
            IMAGE_STARTS: len(starts) == samples + 1
            and starts[0] == 0
            and starts[-1] == len(images)
            and not (np.diff(starts) < 0).any(),
            IMAGES: (images["container"] < len(self.manifest.containers)).all()
            and (images["offset"] >= 0).all()
            and (images["length"] > 0).all()
            and (images["length"] <= MAX_IMAGE_BYTES).all()
            and self._inside_tars(),
            IMAGE_NAMES: not (np.diff(names, prepend=0) <= 0).any()
            and (names[-1] if len(names) else 0) == len(self._names),
        }
        for name, fine in good.items():
            if not fine:
                raise InputError(f"{self.directory / name}: contradicts the rest of the dataset; {REMEDY}")

    def _inside_tars(self) -> bool:
        """Whether every image in a tar ends within it."""
        ends = self._images["offset"] + self._images["length"]
        limits = np.array(
            [size if kind == "tar" else np.iinfo(np.int64).max for kind, _, size in self.manifest.containers],
            np.int64,
        )
        return not len(ends) or bool((ends <= limits[self._images["container"]]).all())
