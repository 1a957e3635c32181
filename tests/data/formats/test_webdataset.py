"""Image-text tars: which members make a sample, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamm.data.conversation import Conversation, Skipped, TarPlace
from megamm.data.formats import make_format
from megamm.errors import InputError
from tests.data.formats.example import jpeg, tar


def read(path: Path) -> list[Conversation | Skipped]:
    reader = make_format("webdataset")
    return [entry for chunk in reader.chunks([path]) for entry in reader.read(chunk)]


def test_what_makes_a_sample(tmp_path: Path) -> None:
    good = {"a/1.JPG": jpeg(1), "a/1.cls": b"7", "a/1.txt": b"One\xff"}
    path = tar(tmp_path / "a.tar", good)
    (sample,) = read(path)
    assert isinstance(sample, Conversation) and sample.key == "a/1"
    (place,) = sample.images
    assert isinstance(place, TarPlace) and place.name == "a/1.JPG" and place.encoding == "raw"
    data = path.read_bytes()
    assert data[place.offset : place.offset + place.length] == jpeg(1)
    assert sample.turns[1].text == "One\ufffd"


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"1.jpg": b"x", "1.png": b"x", "1.txt": b"t"}, "two images"),
        ({"1.jpg": b"x", "1.seg.jpg": b"x"}, "no caption"),
        ({"1.jpg.exe": b"x", "1.txt": b"t"}, "no image"),
        ({"1.jpg": b"x", "1.txt": b" \n"}, "no caption"),
        ({"1.jpg": b"x", "1.txt": b"<image>"}, "no caption"),
        ({"1.jpg": b"x", "1.txt": b"t" * (2 << 20)}, "more than"),
        ({"1.jpg": b"x", "1.json": b"{"}, "no JSON"),
        ({"1.jpg": b"x", "1.json": b"[" * 100_000}, "no JSON"),
        ({"1.jpg": b"x", "1.json": b"[1]"}, "fetched"),
        ({"1.jpg": b"x", "1.txt": b"t", "1.json": b'{"status": null}'}, "fetched"),
        ({"1.jpg": b"x", "1.json": b'{"caption": ["t"]}'}, "no caption"),
        ({"1.jpg": b"x", "1.json": json.dumps({"caption": "\ud800"}).encode()}, "no caption"),
    ],
)
def test_what_is_left_out(members: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    good = {"2.jpg": jpeg(1), "2.txt": b"Two"}
    first, second = read(tar(tmp_path / "a.tar", members | good))
    assert isinstance(first, Skipped) and reason in first.reason
    assert isinstance(second, Conversation) and (second.key, second.position) == ("2", 1)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no files"):
        read(tar(tmp_path / "a.tar", {}))
