"""Where images lie: folders of files and uncompressed tar files, read in place, never unpacked."""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from megamm.data.image_header import ImageError
from megamm.errors import InputError

MAX_OPEN_TARS = 64  # file descriptors that a store keeps
MAX_IMAGE_BYTES = 1 << 30  # larger files are no images; bounds what one read may allocate


class Container(NamedTuple):
    """A folder or a tar file of images; `size` in bytes is that of the tar (0 for folders)."""

    kind: Literal["folder", "tar"]
    path: str
    size: int


class Location(NamedTuple):
    """Bytes of one image: a file of a folder (offset 0, whole file) or a stretch of a tar."""

    container: int
    name: str
    offset: int
    length: int


def describe(path: Path) -> Container:
    """The container at `path`, by its absolute path.

    Raises:
        InputError: neither a folder nor a tar file.
    """
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return Container("folder", str(path), 0)
    if path.is_file() and tarfile_like(path):
        return Container("tar", str(path), path.stat().st_size)
    raise InputError(f"{path}: is neither a folder nor an uncompressed tar file; give where the images lie")


def tarfile_like(path: Path) -> bool:
    """Whether the file begins like an uncompressed tar."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return False


def safe_name(name: str) -> str | None:
    """`name` as a relative path that stays inside its folder, or None."""
    if not name or "\0" in name or "\\" in name:
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return str(path)


def index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of every regular file in a tar, by name; nothing is unpacked.

    Links, devices, sparse files and names that would leave the folder are left out. Of members with
    the same name the last counts, as in unpacking.

    Raises:
        InputError: the tar is damaged or cut short.
    """
    size = path.stat().st_size
    members: dict[str, tuple[int, int]] = {}
    problem = InputError(f"{path}: the tar file is damaged or cut short; copy or write it again")
    try:
        with tarfile.open(path, "r:") as tar, open(path, "rb") as file:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member; a shard has many
                name = safe_name(member.name)
                if not member.isreg() or member.issparse() or name is None:
                    continue
                if member.size < 0 or member.offset_data + member.size > size:
                    raise problem
                members[name] = (member.offset_data, member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise problem
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError, RecursionError):
        raise problem from None
    return members


class ImageStore:
    """Reads images out of containers; may be used by several threads."""

    def __init__(self, containers: list[Container]):
        self.containers = containers
        self._lock = threading.Lock()
        self._tars: OrderedDict[int, int] = OrderedDict()  # container -> file descriptor, oldest first

    def check(self) -> None:
        """Raises InputError where a container is gone or a tar has changed its size."""
        for kind, path, size in self.containers:
            found = os.path.isdir(path) if kind == "folder" else os.path.isfile(path)
            if not found:
                raise InputError(f"{path}: the images lay there and are gone; put them back or prepare again")
            if kind == "tar" and os.path.getsize(path) != size:
                raise InputError(f"{path}: has changed since `megamm prepare`; prepare again")

    def source(self, location: Location) -> str:
        """The path of the container, for reports."""
        return self.containers[location.container].path

    def find(self, container: int, name: str) -> Location:
        """The file `name` of a folder. Symbolic links are followed: large collections are laid out with
        them, and a name alone cannot make one.

        Raises:
            ImageError: missing, no regular file, or a name that leaves the folder.
        """
        if safe_name(name) is None:
            raise ImageError("the path leaves the image folder")
        try:
            status = os.stat(os.path.join(self.containers[container].path, name))
        except (OSError, ValueError):
            raise ImageError("the file is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("is not a regular file")
        return Location(container, name, 0, status.st_size)

    def read(self, location: Location) -> bytes:
        """The bytes of an image.

        Raises:
            ImageError: they cannot be read, or are fewer or more than the location says.
        """
        if not 0 <= location.length <= MAX_IMAGE_BYTES:
            raise ImageError(f"has {location.length} bytes, too many for an image")
        try:
            if self.containers[location.container].kind == "folder":
                return self._read_file(location)
            return self._read_tar(location)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise ImageError("the file is missing" if missing else f"cannot be read ({error})") from None

    def close(self) -> None:
        """Close the tar files that are open."""
        with self._lock:
            while self._tars:
                os.close(self._tars.popitem()[1])

    def _read_file(self, location: Location) -> bytes:
        path = os.path.join(self.containers[location.container].path, location.name)
        # Not blocking: what became a pipe since `find` would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            data = file.read(location.length + 1)
        if len(data) != location.length:
            raise ImageError("the file has changed since `megamm prepare`")
        return data

    def _read_tar(self, location: Location) -> bytes:
        with self._lock:
            descriptor = os.dup(self._descriptor(location.container))  # survives closing by another thread
        try:
            data = os.pread(descriptor, location.length, location.offset)
        finally:
            os.close(descriptor)
        if len(data) != location.length:
            raise ImageError("the tar file is cut short")
        return data

    def _descriptor(self, container: int) -> int:
        if container in self._tars:
            self._tars.move_to_end(container)
            return self._tars[container]
        if len(self._tars) >= MAX_OPEN_TARS:
            os.close(self._tars.popitem(last=False)[1])
        self._tars[container] = os.open(self.containers[container].path, os.O_RDONLY | os.O_CLOEXEC)
        return self._tars[container]
