"""Names of images in tars, found by a sorted index on disk."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from megamm.data import image_places
from megamm.data.image_places import ImagePlaces, Place, build
from megamm.data.image_store import index_tar
from megamm.errors import InputError


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def places(root: Path, *paths: str) -> ImagePlaces:
    """The index of tars, which are the containers 5, 6, ..."""
    build(list(enumerate(paths, start=5)), root, lambda function, jobs: (function(job) for job in jobs))
    assert not list(root.glob("bucket*")) and not list(root.glob("*.unfinished"))
    return ImagePlaces(root)


def test_every_name_is_found_where_it_lies(tmp_path: Path) -> None:
    names = [f"{i % 7}/{i:05}.jpg" for i in range(3000)]
    tars = [
        write_tar(tmp_path / f"{t}.tar", [(name, name.encode()) for name in names[t::3]]) for t in range(3)
    ]
    found = places(tmp_path, *tars)
    assert len(found) == 3000
    for t, tar in enumerate(tars):
        for name, (offset, length) in index_tar(Path(tar)).items():
            assert found.find(name) == found.find(f"./{name}") == Place(5 + t, offset, length)
    for name in ("nowhere.jpg", "0/00000.png", "../0/00000.jpg", "", "/0/00000.jpg"):
        assert found.find(name) is None


def test_the_first_tar_and_the_last_member_count(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "1.tar", [("a", b"old"), ("b", b"1"), ("a", b"newer")])
    two = write_tar(tmp_path / "2.tar", [("a", b"other"), ("c", b"22")])
    found = places(tmp_path, one, two)
    assert len(found) == 3
    assert found.find("a") == Place(5, *index_tar(Path(one))["a"])
    assert found.find("c") == Place(6, *index_tar(Path(two))["c"])
    assert len(places(tmp_path, write_tar(tmp_path / "3.tar", []))) == 0
    assert ImagePlaces(tmp_path).find("a") is None


def test_names_whose_hashes_begin_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one bucket under one 64-bit hash; the other 32 bits tell."""
    monkeypatch.setattr(image_places, "name_key", lambda name: b"\xff" * 8 + name[:4].rjust(4).encode())
    files = [(f"{i}.jp", bytes(i)) for i in range(30)]
    found = places(tmp_path, write_tar(tmp_path / "1.tar", files), write_tar(tmp_path / "2.tar", files[::-1]))
    assert len(found) == 30
    for name, data in files:
        place = found.find(name)
        assert place is not None and (place.container, place.length) == (5, len(data))
    assert found.find("30.j") is None


def test_images_are_found_by_the_url_they_came_from(tmp_path: Path) -> None:
    url = "https://example.org/../x/a.jpg?b=\\c"
    told = {"url": url, "key": "000"}
    files = [
        ("000.jpg", b"image"),
        ("000.json", json.dumps(told).encode()),
        ("001.json", json.dumps(told | {"url": "https://example.org/none"}).encode()),
        ("002.webp", b"another"),
        ("002.json", b'{"url": "https://example.org/2'),
        ("003.png", b"third"),
        ("003.json", json.dumps({"url": ["https://example.org/3"]}).encode()),
        ("004.png", b"fourth"),
        ("004.json", json.dumps({"url": "000.jpg"}).encode()),  # a name is no URL
    ]
    found = places(tmp_path, write_tar(tmp_path / "1.tar", files))
    assert found.find(url) == found.find("000.jpg") != found.find("004.png")
    assert len(found) == len(files) + 1
    assert found.find("https://example.org/none") is None


def test_a_damaged_tar_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "1.tar", [("a", b"x" * 2000)])
    Path(path).write_bytes(Path(path).read_bytes()[:1000])
    with pytest.raises(InputError, match=r"1.tar: .*damaged or cut short"):
        places(tmp_path, path)
    assert not (tmp_path / image_places.PLACES).exists()
