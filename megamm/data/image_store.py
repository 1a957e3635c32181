"""Where images lie: folders of files and uncompressed tar files, read in place, never unpacked."""

from __future__ import annotations

import base64
import os
import stat
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from megamm.data.image_header import ImageError
from megamm.errors import InputError

MAX_OPEN_TARS = 64  # file descriptors that a store keeps
MAX_IMAGE_BYTES = 1 << 30  # larger files are no images; bounds what one read may allocate
MAX_HEADER_BYTES = 1 << 20  # of a tar, names of members included


class Container(NamedTuple):
    """A folder or a tar file of images; `size` in bytes is that of the tar (0 for folders).

    In a tar of the kind "base64" the stretch that an image takes is its text in base64.
    """

    kind: Literal["folder", "tar", "base64"]
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
        with open(path, "rb") as file, _open_tar(file):
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


class TarMember(NamedTuple):
    """A regular file in a tar: its name, made safe, and where its bytes lie."""

    name: str
    offset: int
    length: int


def tar_members(path: Path) -> Iterator[TarMember]:
    """The regular files of a tar, in their order; nothing is unpacked.

    Links, devices, sparse files and names that would leave the folder are left out.

    Raises:
        InputError: the tar is damaged, cut short or gone.
    """
    problem = InputError(f"{path}: the tar file is damaged or cut short; copy or write it again")
    try:
        with open(path, "rb") as file, _open_tar(file) as tar:
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile remembers every member; a shard has many
                if tar.offset <= member.offset or member.size < 0:
                    raise problem
                name = safe_name(member.name)
                if not member.isreg() or member.issparse() or name is None:
                    continue
                if member.offset_data + member.size > size:
                    raise problem
                yield TarMember(name, member.offset_data, member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise problem
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError, MemoryError, RecursionError):
        raise problem from None


def index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and length of every member of a tar, by name; see `tar_members`. Of members with the same
    name the last counts, as in unpacking."""
    return {name: (offset, length) for name, offset, length in tar_members(path)}


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload]


class _Headers:
    """A file from which tarfile reads headers only: one that claims to be very long is refused."""

    def __init__(self, file: IO[bytes]):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too long")
        return self._read(size)


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
            ImageError: they cannot be read, are fewer or more than the location says, or no base64.
        """
        data = self._read(location, location.length)
        return _from_base64(data) if self.containers[location.container].kind == "base64" else data

    def head(self, location: Location, size: int) -> bytes:
        """The first `size` bytes of an image, or all if it is shorter; raises ImageError as `read` does."""
        if self.containers[location.container].kind != "base64":
            return self._read(location, min(size, location.length))
        text = -(-size // 3) * 4
        return (
            self.read(location)[:size]
            if text >= location.length
            else _from_base64(self._read(location, text))
        )

    def close(self) -> None:
        """Close the tar files that are open."""
        with self._lock:
            while self._tars:
                os.close(self._tars.popitem()[1])

    def _read(self, location: Location, size: int) -> bytes:
        """The first `size` bytes of the stretch."""
        if not 0 <= location.length <= MAX_IMAGE_BYTES:
            raise ImageError(f"has {location.length} bytes, too many for an image")
        try:
            if self.containers[location.container].kind == "folder":
                return self._read_file(location, size)
            return self._read_tar(location, size)
        except (OSError, ValueError, OverflowError) as error:
            missing = isinstance(error, FileNotFoundError)
            raise ImageError("the file is missing" if missing else f"cannot be read ({error})") from None

    def _read_file(self, location: Location, size: int) -> bytes:
        path = os.path.join(self.containers[location.container].path, location.name)
        # Not blocking: what became a pipe since `find` would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:  # (the builtin open would leave the descriptor of a folder open)
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("is not a regular file")
            if status.st_size != location.length:
                raise ImageError("the file has changed since `megamm prepare`")
            data = _read_all(descriptor, size)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise ImageError("the file has changed since `megamm prepare`")
        return data

    def _read_tar(self, location: Location, size: int) -> bytes:
        if location.offset + location.length > self.containers[location.container].size:
            raise ImageError("lies behind the end of its tar file")
        with self._lock:
            descriptor = os.dup(self._descriptor(location.container))  # survives closing by another thread
        try:
            data = os.pread(descriptor, size, location.offset)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise ImageError("the tar file is cut short")
        return data

    def _descriptor(self, container: int) -> int:
        if container in self._tars:
            self._tars.move_to_end(container)
            return self._tars[container]
        if len(self._tars) >= MAX_OPEN_TARS:
            os.close(self._tars.popitem(last=False)[1])
        descriptor = os.open(self.containers[container].path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ImageError("its tar file is no regular file any more")
        self._tars[container] = descriptor
        return descriptor


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size)
    while len(data) < size and (more := os.read(descriptor, size - len(data))):
        data += more
    return data


def _from_base64(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ImageError("is no base64 text") from None
