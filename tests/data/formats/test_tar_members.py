"""The walk over a tar: tarfile's members, cut into stretches, and an error for whatever is no tar."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from megamm.data.formats import make_format
from megamm.data.formats.tar_members import Member, members, open_tar, stretches
from megamm.data.image_store import index_tar
from megamm.errors import InputError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def walked(path: Path) -> list[Member]:
    with open_tar(path) as descriptor:
        return list(members(descriptor))


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


def odd_tar(path: Path, form: int) -> Path:
    """Long names, every other kind of member, names that leave the folder, the same name twice."""
    deep = "/".join(["folder"] * 12) if form == tarfile.USTAR_FORMAT else "ö" * 150 + "/" + "y" * 130
    with tarfile.open(path, "w", format=form) as archive:
        for name in ("a.jpg", f"{deep}/b.jpg", "c.jpg", "a.jpg", "empty", "../d.jpg", "/e.jpg", "f\\g.jpg"):
            add(archive, name, b"" if name == "empty" else name.encode() * 70)
        add(archive, "dir", type=tarfile.DIRTYPE)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            add(archive, "link.jpg", type=kind, linkname="../" + "x" * 90)
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            add(archive, "device.jpg", type=kind)
        add(archive, "last.jpg", b"z" * 512)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    path = odd_tar(tmp_path / "a.tar", form)
    found = walked(path)
    assert {m.name: (m.offset, m.length) for m in found} == index_tar(path)
    assert [m.name for m in found].count("a.jpg") == 2 and len(found) == 6
    with tarfile.open(path) as archive:
        headers = {info.offset for info in archive}
    assert {m.header for m in found} <= headers


@pytest.mark.parametrize("form", FORMATS)
def test_stretches_hold_every_member_once(tmp_path: Path, form: int) -> None:
    path = odd_tar(tmp_path / "a.tar", form)
    whole = walked(path)
    for size in (1, 2, 4, 100):
        pieces = list(stretches(path, lambda name: name, size))
        assert [piece.first for piece in pieces] == list(range(0, len(whole), size))
        with open_tar(path) as descriptor:
            assert [m for p in pieces for m in members(descriptor, p.start, p.end)] == whole


def test_a_tar_of_tarfile_s_tools(tmp_path: Path) -> None:
    """Base 256 sizes and a tar without the blocks at its end, as some programs write them."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "a.jpg", b"data")
    data = bytearray(path.read_bytes()[:1024])
    data[124:136] = b"\x80" + (4).to_bytes(11, "big")
    checksum(data, 0)
    path.write_bytes(data)
    assert walked(path) == [Member("a.jpg", 0, 512, 4)]


def test_sizes_that_count_and_others(tmp_path: Path) -> None:
    """That of a pax header counts; that of a link does not, as nothing follows it."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "a.jpg", b"data" * 10)
        add(archive, "link", type=tarfile.SYMTYPE, linkname="a.jpg")
        add(archive, "b.jpg", b"data")
    data = edited(1024 + 124, b"00000001000\0")(bytearray(path.read_bytes()))
    path.write_bytes(extended(b"x", b"10 size=7\n")(data))
    assert walked(path) == [Member("a.jpg", 0, 1536, 7), Member("b.jpg", 2560, 3072, 4)]
    with tarfile.open(path) as archive:
        assert {(info.name, info.size) for info in archive if info.isreg()} == {("a.jpg", 7), ("b.jpg", 4)}


def checksum(data: bytearray, header: int) -> None:
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])


def edited(at: int, value: bytes, sign: bool = True) -> Callable[[bytearray], bytearray]:
    def edit(data: bytearray) -> bytearray:
        data[at : at + len(value)] = value
        if sign:
            checksum(data, at // 512 * 512)
        return data

    return edit


def extended(kind: bytes, data: bytes, size: int | None = None) -> Callable[[bytearray], bytearray]:
    """The tar with an extended header in front."""

    def edit(rest: bytearray) -> bytearray:
        header = bytearray(512)
        header[0:4], header[156:157] = b"name", kind
        header[124:136] = b"%011o\0" % (len(data) if size is None else size)
        checksum(header, 0)
        return header + data + bytes(-len(data) % 512) + rest

    return edit


HOSTILE = {
    "empty": lambda data: bytearray(),
    "no tar": lambda data: bytearray(b"<html>" * 300),
    "cut in a header": lambda data: data[:700],
    "cut in a member": lambda data: data[: 512 + 100],
    "cut in the padding": lambda data: data[: 512 + 1024 + 100],
    "size beyond the file": edited(124, b"77777777777\0"),
    "huge size": edited(124, b"\x80" + b"\x7f" * 11),
    "negative size": edited(124, b"\xff" * 12),
    "no number": edited(124, b"12x\0"),
    "checksum": edited(0, b"zzz", sign=False),
    "long name without end": extended(b"L", b"x", size=1 << 40),
    "huge long name": extended(b"L", b"x" * (1 << 17)),
    "pax without length": extended(b"x", b"path=x\n"),
    "pax length beyond": extended(b"x", b"99 path=x\n"),
    "pax length of digits": extended(b"x", b"9" * 5000 + b" path=x\n"),
    "pax size": extended(b"x", b"28 size=99999999999999999\n\0\0"),
    "another size by pax": lambda data: extended(b"x", b"12 size=512\n")(data[:1536]),
    "a member of a page's size, cut": lambda data: data[: 512 + 512],
    "pax size of letters": extended(b"x", b"11 size=xy\n"),
    "global path": extended(b"g", b"10 path=x\n"),
    "extended header alone": lambda data: extended(b"x", b"10 path=x\n")(bytearray())[:],
    "headers without end": lambda data: extended(b"L", b"x\0" * 30000)(
        extended(b"L", b"x\0" * 30000)(bytearray()) * 10 + data
    ),
    "unknown kind, negative size": lambda data: edited(124, b"\xff" * 12)(edited(156, b"Z")(data)),
    "sparse of many parts": lambda data: edited(482, b"\x01")(edited(156, b"S")(data)),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_tars(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        add(archive, "a.jpg", b"x" * 1000)
        add(archive, "a.txt", b"text")
    path.write_bytes(HOSTILE[case](bytearray(path.read_bytes())))
    with pytest.raises(InputError, match=r"a\.tar: "):
        read = make_format("webdataset")
        for chunk in read.chunks([path]):
            list(read.read(chunk))


def test_no_such_tar(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.tar: cannot be read"):
        list(make_format("webdataset").chunks([tmp_path / "no.tar"]))


def test_random_damage(tmp_path: Path) -> None:
    draw = random.Random(5)
    for form in FORMATS:
        good = odd_tar(tmp_path / "good.tar", form).read_bytes()
        for number in range(150):
            data = bytearray(good)
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(data) // 512) * 512 + draw.choice(
                    [0, 124, 130, 148, 156, 257, 345, 511]
                )
                data[at : at + 3] = struct.pack("<I", draw.getrandbits(32))[: draw.randint(1, 3)]
                if draw.random() < 0.8:
                    checksum(data, at // 512 * 512)
            path = tmp_path / f"{number}.tar"
            path.write_bytes(data)
            try:
                found = walked(path)
            except InputError:
                continue
            assert all(0 <= m.offset <= m.offset + m.length <= len(data) for m in found)
            assert all(not m.name.startswith("/") and ".." not in m.name.split("/") for m in found)


def test_memory_does_not_grow_with_the_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(6000):
            archive.members.clear()
            add(archive, f"{i // 3:09d}.{('jpg', 'json', 'txt')[i % 3]}", b"x" if i % 3 != 1 else b"{}")
    read = make_format("webdataset")
    tracemalloc.start()
    try:
        count = sum(1 for chunk in read.chunks([path]) for _ in read.read(chunk))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2000 and peak < 200_000
