"""Where the pictures of a benchmark lie: files that are looked up by name, or bytes that came "
"with a table."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import IO, Protocol

from megamm.data.image_header import ImageError, check_length, open_image
from megamm.errors import InputError
from megamm.whole_files import read_whole


class Source(Protocol):
    """One picture that can be read.

    Attributes:
        name: for reports.
    """

    @property
    def name(self) -> str: ...

    def is_there(self) -> bool:
        """Whether there is something to read; nothing is opened."""

    def read(self) -> bytes:
        """The encoded picture; raises OSError or ImageError."""


class Folders:
    """Folders in which pictures are looked for, in this order, and the folders within them that a release
    keeps them in.

    Args:
        roots: the folders.
        below: names of folders within each; the root itself comes first.
    """

    def __init__(self, roots: Sequence[Path], below: Sequence[str] = ()) -> None:
        self._places = [root / name for root in roots for name in ("", *below)]

    def picture(self, *names: str) -> Named:
        """The picture that has one of these names, relative to one of the folders."""
        return Named(self, names)

    def find(self, names: Sequence[str]) -> Path | None:
        """The first file that is there."""
        for place in self._places:
            for name in names:
                if os.path.isfile(path := place / name):
                    return path
        return None

    def where(self, names: Sequence[str]) -> Path:
        """Where the picture was looked for first, for reports."""
        return self._places[0] / names[0]


@dataclass(frozen=True)
class Named:
    """A picture file, looked up when it is wanted."""

    folders: Folders
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return str(self.folders.where(self.names))

    def is_there(self) -> bool:
        return self.folders.find(self.names) is not None

    def read(self) -> bytes:
        path = self.folders.find(self.names)
        if path is None:
            raise FileNotFoundError(2, "no such picture", self.name)
        check_length(path.stat().st_size)
        return read_whole(path)


class Spool:
    """Pictures that came within tables, kept in an unnamed file instead of in memory; equal ones once."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="megamm-")  # noqa: SIM115 (lives as long as this)
        self._places: dict[bytes, tuple[int, int]] = {}
        self._end = 0

    def keep(self, data: bytes, name: str) -> Kept:
        """Keep a picture.

        Args:
            data: encoded.
            name: for reports.
        """
        key = blake2b(data, digest_size=16).digest()
        if key not in self._places:
            self._file.write(data)
            self._file.flush()
            self._places[key] = (self._end, len(data))
            self._end += len(data)
        return Kept(self._file, *self._places[key], name)


@dataclass(frozen=True)
class Kept:
    """A picture in a Spool: `length` bytes at `offset`."""

    file: IO[bytes]
    offset: int
    length: int
    name: str

    def is_there(self) -> bool:
        return True

    def read(self) -> bytes:
        check_length(self.length)
        return os.pread(self.file.fileno(), self.length, self.offset)


def read_picture(source: Source, max_pixels: int) -> bytes:
    """The encoded picture, after it was decoded once to see that it can be.

    Raises:
        ImageError: it cannot be shown, and why.
    """
    try:
        data = source.read()
        with open_image(data, max_pixels) as image:
            image.load()
            if image.mode == "F":
                raise ImageError("has floating-point pixels, whose range is unknown")
    except ImageError as error:
        raise ImageError(f"{source.name}: {error}") from None
    except OSError as error:
        raise ImageError(f"{source.name}: {error.strerror or 'cannot be decoded'}") from None
    except Exception as error:  # decoders meet damaged bytes with exceptions of any kind
        raise ImageError(f"{source.name}: cannot be decoded ({error})") from None
    return data


def check_folders(sources: Iterable[Source], what: str) -> None:
    """Raise InputError if not one of the pictures is there; single ones may be missing.

    Args:
        what: they belong to, for the error.
    """
    first = None
    for source in sources:
        if source.is_there():
            return
        first = first or source
    if first is not None:
        raise InputError(
            f"{first.name}: no such picture, nor any other of {what}; give the folder of the pictures with "
            "--images"
        )
