"""Where in which tar each image lies, by name: an index on disk that many processes share.

Two files of equally many rows, sorted by hash: `hashes` (u64, the first 8 bytes of the name's blake2b) and
`places` (PLACE). They are mapped and searched by bisection, so neither opening them nor looking up costs
memory in the number of images; 32 further bits of the name's hash tell names apart whose first 64 are equal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megamm.data.image_store import TarMember, safe_name, tar_members
from megamm.data.token_file import map_file

PLACE = np.dtype([("check", "<u4"), ("container", "<u4"), ("length", "<i8"), ("offset", "<i8")])
ROW = np.dtype([("hash", "<u8"), ("place", PLACE)])
KEY = np.dtype([("hash", ">u8"), ("check", ">u4")])  # what name_key gives
HASHES, PLACES = "image_hashes.bin", "image_places.bin"
BUCKETS = 256  # of a hash's first byte; one at a time is sorted in memory
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
MAX_JSON = 1 << 20  # bytes of a member that describes an image

# A function over things, done by worker processes perhaps; results in the order of the things.
OrderedMap = Callable[
    [Callable[[tuple[int, str]], bytes], Iterable[tuple[int, str]]], Generator[bytes, None, None]
]


class Place(NamedTuple):
    """A stretch of a tar."""

    container: int
    offset: int
    length: int


def name_key(name: str) -> bytes | None:
    """12 bytes that stand for the name of an image: a path that stays inside, or a URL. None: neither."""
    text = name if "://" in name else safe_name(name)
    return None if text is None else blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()


def index_rows(job: tuple[int, str]) -> bytes:
    """ROWs of the members of a tar, and of the URLs that .json members beside images name as their origin.

    Args:
        job: number of the container, and its path.

    Raises:
        InputError: the tar is damaged.
    """
    container, path = job
    members: dict[str, TarMember] = {}
    for member in tar_members(Path(path)):
        members[member.name] = member
    found = dict(members)
    with open(path, "rb") as file:
        for member in members.values():
            if member.name.endswith(".json") and 0 < member.length <= MAX_JSON:
                url = _url(os.pread(file.fileno(), member.length, member.offset))
                image = _image_of(member.name, members) if url else None
                if image is not None:
                    found.setdefault(url, image)
    keys = np.frombuffer(b"".join(name_key(name) or b"" for name in found), KEY)
    rows = np.zeros(len(found), ROW)
    rows["hash"] = keys["hash"]
    rows["place"]["check"], rows["place"]["container"] = keys["check"], container
    rows["place"]["length"] = [member.length for member in found.values()]
    rows["place"]["offset"] = [member.offset for member in found.values()]
    return rows.tobytes()


def _url(data: bytes) -> str:
    """The "url" of img2dataset's description of an image, or ""."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    url = content.get("url") if isinstance(content, dict) else None
    return url if isinstance(url, str) and "://" in url else ""


def _image_of(name: str, members: dict[str, TarMember]) -> TarMember | None:
    """The member of the same name with the suffix of an image."""
    stem = name.removesuffix(".json")
    return next((members[stem + suffix] for suffix in sorted(SUFFIXES) if stem + suffix in members), None)


def build(tars: Sequence[tuple[int, str]], directory: Path, ordered_map: OrderedMap) -> None:
    """Write the index of tars into `directory`, in bounded memory. A name that several have counts where it
    is found first.

    Args:
        tars: number of the container and path of each.
        ordered_map: applies a function to all of them.

    Raises:
        InputError: a tar is damaged.
    """
    buckets = [directory / f"bucket{number}" for number in range(BUCKETS)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in buckets]
        results = stack.enter_context(closing(ordered_map(index_rows, tars)))
        for data in results:
            rows = np.frombuffer(data, ROW)
            rows = rows[np.argsort(rows["hash"], kind="stable")]
            ends = np.searchsorted(rows["hash"] >> np.uint64(56), np.arange(BUCKETS + 1))
            for number in np.flatnonzero(np.diff(ends)):
                files[number].write(rows[ends[number] : ends[number + 1]].tobytes())
    unfinished = directory / f"{PLACES}.unfinished"
    with open(directory / HASHES, "wb") as hashes, open(unfinished, "wb") as places:
        for path in buckets:
            rows = _first_of_each(np.fromfile(path, ROW))
            hashes.write(rows["hash"].tobytes())
            places.write(rows["place"].tobytes())
            path.unlink()
    unfinished.rename(directory / PLACES)


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """Rows sorted by hash and check; of those that agree in both, the first."""
    rows = rows[np.lexsort((rows["place"]["check"], rows["hash"]))]  # stable: equal ones keep their order
    repeated = (rows["hash"][1:] == rows["hash"][:-1]) & (
        rows["place"]["check"][1:] == rows["place"]["check"][:-1]
    )
    return rows[np.concatenate([np.ones(min(len(rows), 1), bool), ~repeated])]


class ImagePlaces:
    """Looks up names in an index that `build` wrote."""

    def __init__(self, directory: Path):
        self._hashes = map_file(directory / HASHES, np.dtype("<u8"))
        self._places = map_file(directory / PLACES, PLACE)

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, name: str) -> Place | None:
        """Where the image lies, or None."""
        key = name_key(name)
        if key is None or not len(self._hashes):
            return None
        first, check = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        row = int(np.searchsorted(self._hashes, np.uint64(first)))
        while row < len(self._hashes) and int(self._hashes[row]) == first:
            place = self._places[row]
            if int(place["check"]) == check:
                return Place(int(place["container"]), int(place["offset"]), int(place["length"]))
            row += 1
        return None
