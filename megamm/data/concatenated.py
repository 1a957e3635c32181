"""Several prepared datasets read as one: rows and image records are numbered through."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from megamm.config import DataConfig
from megamm.data.image_store import Location
from megamm.data.indexed import SKIPPED, PreparedDataset, Sample
from megamm.data.samples import Samples
from megamm.errors import InputError


class ConcatenatedDataset:
    """Datasets one behind the other; has the reading methods of `PreparedDataset`.

    Attributes:
        parts: the datasets.
        first_rows, first_images: where the rows and the image records of each begin, and the end of all.
    """

    def __init__(self, parts: Sequence[PreparedDataset]) -> None:
        self.parts = list(parts)
        self.first_rows = _ends([len(part) for part in parts])
        self.first_images = _ends([part.num_images for part in parts])

    @classmethod
    def open(cls, data: DataConfig) -> ConcatenatedDataset:
        """The datasets that `data.train` names.

        Raises:
            InputError: there are none, or one is missing or damaged.
        """
        sources = data.sources()
        if not sources:
            raise InputError("data.train: is not set; give a directory written by `megamm prepare`")
        return cls([PreparedDataset(source.path) for source in sources])

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, row: int) -> Sample:
        number = _owner(self.first_rows, row)
        tokens, learnt, images = self.parts[number][row - int(self.first_rows[number])]
        first = int(self.first_images[number])
        return Sample(tokens, learnt, range(first + images.start, first + images.stop))

    def samples(self, rows: np.ndarray) -> Samples:
        """The samples `rows` [n], verified.

        Raises:
            InputError: one of them is damaged.
        """
        owners = np.searchsorted(self.first_rows, rows, side="right") - 1
        found, places = [], []
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            part = self.parts[number].samples(rows[mine] - self.first_rows[number])
            found.append(part._replace(first_images=part.first_images + self.first_images[number]))
            places.append(mine)
        if len(found) == 1:
            return found[0]
        order = np.empty(len(rows), np.int64)
        order[np.concatenate(places)] = np.arange(len(rows))
        return Samples.joined(found, order)

    @property
    def num_images(self) -> int:
        return int(self.first_images[-1])

    def sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Stored tokens (an image counts as one) and images of the samples `rows` [n]: [n] int64 each."""
        owners = np.searchsorted(self.first_rows, rows, side="right") - 1
        tokens, images = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        for number in np.unique(owners):
            mine = owners == number
            tokens[mine], images[mine] = self.parts[number].sizes(rows[mine] - self.first_rows[number])
        return tokens, images

    def location(self, image: int) -> Location:
        """Where in its dataset the bytes of an image lie."""
        part, number = self._image(image)
        return part.location(number)

    def read_image(self, image: int) -> bytes:
        """The encoded bytes of an image.

        Raises:
            ImageError: they cannot be read, or are not those that were prepared.
        """
        part, number = self._image(image)
        return part.read_image(number)

    def image_source(self, image: int) -> str:
        """The path of the folder or tar in which an image lies."""
        part, number = self._image(image)
        return part.store.source(part.location(number))

    def origin(self, row: int) -> tuple[Path, int]:
        """The dataset's directory and the row in it of the sample `row`."""
        number = _owner(self.first_rows, row)
        return self.parts[number].directory, int(row - self.first_rows[number])

    @property
    def directory(self) -> str:
        """The directories, for messages."""
        return ", ".join(str(part.directory) for part in self.parts)

    def fingerprints(self) -> list[str]:
        """For each dataset, what tells its contents from others'."""
        found = []
        for part in self.parts:
            files = {name: entry.sha256 for name, entry in part.manifest.files.items() if name != SKIPPED}
            found.append(hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16])
        return found

    def check(self) -> None:
        """Compare every byte of every dataset with its manifest; raises InputError."""
        for part in self.parts:
            part.check()

    def close(self) -> None:
        """Close the tar files that are open."""
        for part in self.parts:
            part.close()

    def _image(self, image: int) -> tuple[PreparedDataset, int]:
        number = _owner(self.first_images, image)
        return self.parts[number], int(image - self.first_images[number])


def _ends(sizes: Sequence[int]) -> np.ndarray:
    return np.array(list(accumulate(sizes, initial=0)), np.int64)


def _owner(firsts: np.ndarray, number: int) -> int:
    """Whose `number` is; the last of those that begin there, as those before it have none."""
    return int(np.searchsorted(firsts, number, side="right")) - 1
