"""The regular files in a tar, read header by header without holding any: shards have millions.

Python's tarfile keeps every member, reads extended headers of any size at once and takes three times as
long. Layouts: POSIX ustar and pax (IEEE Std 1003.1, pax), and GNU's long names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from megamm.data.image_store import safe_name
from megamm.errors import InputError

BLOCK = 512
_PLAIN = re.compile(r"\w[\w.-]*")  # safe at sight: most names are, and pathlib takes its time
MAX_EXTENDED = 1 << 16  # bytes of an extended header: a name, times, attributes


class Member(NamedTuple):
    """A regular file in a tar: its name, where its first header and its bytes begin, and its length."""

    name: str
    header: int
    offset: int
    length: int


class Stretch(NamedTuple):
    """Bytes of a tar that hold whole members, and the number of the first group of members in them."""

    start: int
    end: int
    first: int


class _DamagedError(Exception):
    """The tar cannot be read on."""


@contextmanager
def open_tar(path: str | Path) -> Iterator[int]:
    """A descriptor of a tar file.

    Raises:
        InputError: it cannot be opened; also for what goes wrong while `members` reads it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a tar file") from None
    except _DamagedError as error:
        raise InputError(
            f"{path}: the tar file is damaged or cut short ({error}); copy or write it again"
        ) from None


def members(descriptor: int, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The regular files from byte `start` on, up to those that begin at `end`, in their order. Links,
    devices, folders, sparse files and names that would leave the folder are left out."""
    size = os.fstat(descriptor).st_size
    header = position = start
    name: bytes | None = None
    length: int | None = None
    sparse = False
    while end is None or position < end:
        block = os.pread(descriptor, BLOCK, position)
        if not block.strip(b"\0"):
            if len(block) not in (0, BLOCK) or header != position:
                raise _DamagedError(f"it breaks off at byte {position}")
            return
        kind, own_length = _header(block, position)
        offset, stored = position + BLOCK, own_length
        if kind in b"LKxg":
            if stored > MAX_EXTENDED:
                raise _DamagedError(f"an extended header of {stored} bytes at byte {position}")
            data = os.pread(descriptor, stored, offset)
            if len(data) != stored:
                raise _DamagedError(f"it breaks off at byte {offset}")
            if kind == b"L":
                name = data.rstrip(b"\0")
            elif kind == b"x":
                told = _pax(data, position)
                name, length = told.get(b"path", name), _number(told.get(b"size"), length, position)
                sparse = sparse or any(key.startswith(b"GNU.sparse") for key in told)
            elif kind == b"g" and {b"path", b"size"} & _pax(data, position).keys():
                raise _DamagedError(f"a global header that renames all members at byte {position}")
        else:
            stored = _stored(block, kind, own_length if length is None else length, position)
            if offset + stored > size:
                raise _DamagedError(f"a member of {stored} bytes at byte {position}")
            known = _name(block) if name is None else name
            safe = _safe(known.decode("utf-8", "replace")) if kind in b"0\0" and not sparse else None
            if safe is not None and not known.endswith(b"/"):  # the old mark of a folder
                yield Member(safe, header, offset, stored)
            name, length, sparse = None, None, False
        position = offset + -(-stored // BLOCK) * BLOCK
        if position > size:
            raise _DamagedError(f"it breaks off at byte {size}")
        if kind not in b"LKxg":
            header = position
        elif position - header > 4 * MAX_EXTENDED:
            raise _DamagedError(f"extended headers without end at byte {header}")


def stretches(path: Path, group: Callable[[str], str], size: int) -> Iterator[Stretch]:
    """Cut a tar into stretches of `size` groups; neighbours of the same `group(name)` stay together.

    Raises:
        InputError: the tar is damaged or cut short.
    """
    with open_tar(path) as descriptor:
        start, first, groups, last = 0, 0, 0, None
        end = 0
        for member in members(descriptor):
            name = group(member.name)
            if name != last:
                if groups == size:
                    yield Stretch(start, member.header, first)
                    start, first, groups = member.header, first + groups, 0
                groups, last = groups + 1, name
            end = member.offset + member.length
        if groups:
            yield Stretch(start, end, first)


def read(descriptor: int, member: Member) -> bytes:
    """The bytes of a member."""
    data = os.pread(descriptor, member.length, member.offset)
    if len(data) != member.length:
        raise _DamagedError(f"it breaks off within {member.name}")
    return data


def _safe(name: str) -> str | None:
    return name if _PLAIN.fullmatch(name) else safe_name(name)


def _header(block: bytes, position: int) -> tuple[bytes, int]:
    """Type and size of a header block, its checksum verified."""
    if len(block) != BLOCK:
        raise _DamagedError(f"it breaks off at byte {position}")
    told = _field(block[148:156])
    if told is None or told != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        raise _DamagedError(f"no header at byte {position}")
    size = _field(block[124:136])
    if size is None:
        raise _DamagedError(f"a wrong size at byte {position}")
    return block[156:157], size


def _field(data: bytes) -> int | None:
    """A number of a header: octal digits, or base 256 behind a byte 0x80 (GNU); None if it is no size."""
    if data[0] == 0x80:
        return int.from_bytes(data[1:], "big")
    digits = data.rstrip(b"\0 ").lstrip(b" ").partition(b"\0")[0] or b"0"
    try:
        return int(digits, 8) if digits.isdigit() else None
    except ValueError:
        return None


def _stored(block: bytes, kind: bytes, length: int, position: int) -> int:
    """Bytes that follow the header of a member."""
    if kind == b"S" and block[482]:
        raise _DamagedError(f"a sparse file of many parts at byte {position}")
    return 0 if kind in b"123456" else length


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0]
    # GNU's own layout has other things where POSIX has a prefix.
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax(data: bytes, position: int) -> dict[bytes, bytes]:
    """The records "length key=value\\n" of a pax header."""
    found = {}
    while data.strip(b"\0"):
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or len(length) > 9 or not len(length) + 3 <= int(length) <= len(data):
            raise _DamagedError(f"a wrong extended header at byte {position}")
        key, equals, value = rest[: int(length) - len(length) - 1].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _DamagedError(f"a wrong extended header at byte {position}")
        found[key], data = value[:-1], data[int(length) :]
    return found


def _number(digits: bytes | None, otherwise: int | None, position: int) -> int | None:
    if digits is None:
        return otherwise
    if not digits.isdigit() or len(digits) > 18:
        raise _DamagedError(f"a wrong size at byte {position}")
    return int(digits)
