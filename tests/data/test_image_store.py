"""Folders and tar files: names that stay inside, hostile members, damage, open files."""

from __future__ import annotations

import io
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from megamm.data import image_store
from megamm.data.image_header import ImageError
from megamm.data.image_store import Container, ImageStore, Location, describe, index_tar, safe_name
from megamm.errors import InputError
from tests.data.helpers import write_images, write_tar


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(data)
    return info, data


def write_members(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "name, wanted", [("a.jpg", "a.jpg"), ("x/y/a.jpg", "x/y/a.jpg"), ("./a.jpg", "a.jpg")]
)
def test_safe_names(name: str, wanted: str) -> None:
    assert safe_name(name) == wanted


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "../a", "x/../../a", "a\0b", "..\\a"])
def test_unsafe_names(name: str) -> None:
    assert safe_name(name) is None


def test_hostile_members_are_left_out(tmp_path: Path) -> None:
    members = [
        member("good.jpg", data=b"good"),
        member("../up.jpg", data=b"bad"),
        member("/abs.jpg", data=b"bad"),
        member("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard.jpg", tarfile.LNKTYPE, "good.jpg"),
        member("pipe.jpg", tarfile.FIFOTYPE),
        member("device.jpg", tarfile.CHRTYPE),
        member("folder", tarfile.DIRTYPE),
        member("twice.jpg", data=b"old"),
        member("./sub/" + "n" * 150 + ".jpg", data=b"long name"),
        member("twice.jpg", data=b"new"),
    ]
    path = write_members(tmp_path / "a.tar", members)
    found = index_tar(path)
    assert set(found) == {"good.jpg", "twice.jpg", "sub/" + "n" * 150 + ".jpg"}
    store = ImageStore([describe(path)])
    assert store.read(Location(0, "twice.jpg", *found["twice.jpg"])) == b"new"
    assert store.read(Location(0, "good.jpg", *found["good.jpg"])) == b"good"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_damaged_tars(tmp_path: Path, image_folder: Path) -> None:
    """Cut inside a member, inside a header, and with a header in the middle that is none."""
    big = write_tar(tmp_path / "big.tar", image_folder).read_bytes()
    assert len(index_tar(tmp_path / "big.tar")) == 12
    small = write_members(
        tmp_path / "small.tar", [member(name, data=b"x" * 512) for name in "abc"]
    ).read_bytes()
    damaged = [big[: len(big) // 2], big[:700], small[:1300], small[:1024] + b"\xff" * 512 + small[1536:]]
    for data in damaged:
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(InputError, match=r"bad.tar: .*damaged or cut short"):
            index_tar(tmp_path / "bad.tar")


def test_random_damage_is_our_error_or_a_smaller_index(tmp_path: Path) -> None:
    members = [member(f"{i}.jpg", data=bytes([i]) * 300) for i in range(5)]
    whole = write_members(tmp_path / "a.tar", members).read_bytes()
    draw, path = random.Random(4), tmp_path / "b.tar"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            found = index_tar(path)
        except InputError:
            continue
        for name, (offset, length) in found.items():
            assert safe_name(name) == name and 0 <= offset <= offset + length <= len(data)


@pytest.mark.parametrize("kind", [b"0", b"Z", b"x", b"L"])
@pytest.mark.parametrize("size", [-1024, -513, 1 << 40, 1 << 62])
def test_sizes_that_lead_astray(kind: bytes, size: int, tmp_path: Path) -> None:
    """Backwards, which would never end, or behind the end; and headers too long to be held."""
    info, _ = member("a")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    header[124] = 0o377 if size < 0 else 0o200
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    good = write_members(tmp_path / "good.tar", [member("b", data=b"x" * 600)]).read_bytes()
    (tmp_path / "bad.tar").write_bytes(good[:1536] + bytes(header) + good)
    with pytest.raises(InputError, match=r"bad.tar: .*damaged or cut short"):
        index_tar(tmp_path / "bad.tar")


def test_long_headers_are_not_held(tmp_path: Path) -> None:
    """An extended header of 64 MiB, in a file that has so many."""
    info, _ = member("a", tarfile.XHDTYPE)
    info.size = 1 << 26
    (tmp_path / "bad.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "bad.tar", 1 << 27)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"bad.tar: .*damaged"):
            index_tar(tmp_path / "bad.tar")
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_compressed_and_other_files_are_no_containers(tmp_path: Path, image_folder: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(image_folder, "x")
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    for name in ("a.tar.gz", "b.tar", "missing"):
        with pytest.raises(InputError, match="neither a folder nor an uncompressed tar"):
            describe(tmp_path / name)


def test_few_tars_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "MAX_OPEN_TARS", 3)
    containers, places = [], []
    for i in range(10):
        path = write_members(tmp_path / f"{i}.tar", [member("x", data=bytes([i]))])
        containers.append(describe(path))
        places.append(Location(i, "x", *index_tar(path)["x"]))
    store = ImageStore(containers)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert [store.read(place) for place in places] == [bytes([i]) for i in range(10)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_changed_files(tmp_path: Path) -> None:
    names = write_images(tmp_path / "images", 1)
    store = ImageStore([describe(tmp_path / "images")])
    place = store.find(0, names[0])
    file = tmp_path / "images" / names[0]
    data = file.read_bytes()
    for changed in (data + b"x", data[:-1]):
        file.write_bytes(changed)
        with pytest.raises(ImageError, match="has changed"):
            store.read(place)
    file.unlink()
    with pytest.raises(ImageError, match="missing"):
        store.read(place)
    os.mkfifo(file)
    with pytest.raises(ImageError, match="not a regular file"):
        store.find(0, names[0])
    with pytest.raises(ImageError):
        store.read(place)  # does not wait for a writer
    with pytest.raises(ImageError, match="too many"):
        store.read(place._replace(length=1 << 40))


def test_containers_that_are_gone(tmp_path: Path, image_folder: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", image_folder)
    ImageStore([describe(tar)]).check()
    with pytest.raises(InputError, match="has changed"):
        ImageStore([describe(tar)._replace(size=5)]).check()
    with pytest.raises(InputError, match="are gone"):
        ImageStore([Container("folder", str(tmp_path / "no"), 0)]).check()
