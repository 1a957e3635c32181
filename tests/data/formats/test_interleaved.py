"""Documents with images: the rules of MMC4, OBELICS's parquet, and what neither takes."""

from __future__ import annotations

import base64
import itertools
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from megamm.data.conversation import Conversation, Skipped, TarPlace
from megamm.data.formats import FormatOptions, make_format
from megamm.data.formats.assignment import best_assignment
from megamm.data.formats.interleaved import url_names
from megamm.errors import InputError
from tests.data.formats.example import heavy, tar, write_lines

ALL = FormatOptions(keep_single_image=1.0)


def read(format: str, path: Path, options: FormatOptions = ALL) -> list[Conversation | Skipped]:
    reader = make_format(format, options)
    return [entry for chunk in reader.chunks([path]) for entry in reader.read(chunk)]


def page(similarity: list[list[Any]], **fields: Any) -> dict[str, Any]:
    infos = [{"image_name": f"{i}.jpg"} for i in range(len(similarity))]
    sentences = [f"s{i}" for i in range(len(similarity[0]) if similarity else 3)]
    return {"text_list": sentences, "image_info": infos, "similarity_matrix": similarity} | fields


def test_the_best_assignment_is_the_best_of_all() -> None:
    draw = np.random.default_rng(1)
    for number in range(300):
        rows, columns = draw.integers(1, 6, 2).tolist()
        gain = draw.normal(size=(rows, columns)) if number % 2 else draw.integers(0, 3, (rows, columns)) * 1.0
        pairs = best_assignment(gain)
        small, large = sorted((rows, columns))
        wide = gain if rows <= columns else gain.T
        ways = itertools.permutations(range(large), small)
        best = max(sum(wide[i, p] for i, p in enumerate(way)) for way in ways)
        assert len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) == small
        assert sum(gain[pair] for pair in pairs) == pytest.approx(best, abs=1e-9)
    assert best_assignment(np.zeros((0, 3))) == best_assignment(np.zeros((3, 0))) == []


def test_mmc4_options(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [page(np.diag([0.9, 0.24, 0.2399, 0.5]).tolist())])
    wanted = {
        FormatOptions(): ("<image>s0 <image>s1 s2 <image>s3", ["0.jpg", "1.jpg", "3.jpg"]),
        FormatOptions(min_similarity=0.5): ("<image>s0 s1 s2 <image>s3", ["0.jpg", "3.jpg"]),
        FormatOptions(max_images=2): ("<image>s0 <image>s1 s2 s3", ["0.jpg", "1.jpg"]),
    }
    for options, (text, images) in wanted.items():
        (found,) = read("mmc4", path, options)
        assert isinstance(found, Conversation)
        assert found.turns[0].text == text and [names[0] for names in found.images] == images


def test_images_stand_in_the_order_of_the_text(tmp_path: Path) -> None:
    (found,) = read("mmc4", write_lines(tmp_path / "a.jsonl", [page([[0.1, 0.1, 0.9], [0.8, 0.1, 0.1]])]))
    assert isinstance(found, Conversation)
    assert found.images == [("1.jpg",), ("0.jpg",)]


def test_a_share_of_documents_with_one_image_is_left_out(tmp_path: Path) -> None:
    """The same ones wherever they stand, and more where more is asked for."""
    pages = [page([[0.9, 0.1]], text_list=[f"number {i}", "end"]) for i in range(400)]
    kept: dict[float, list[str]] = {}
    for share in (0.0, 0.5, 0.8, 1.0):
        for order in (pages, pages[::-1]):
            path = write_lines(tmp_path / "a.jsonl", order)
            found = read("mmc4", path, FormatOptions(keep_single_image=share))
            texts = sorted(e.turns[0].text for e in found if isinstance(e, Conversation))
            assert kept.setdefault(share, texts) == texts
            assert all(e.reason == "has one image only" for e in found if isinstance(e, Skipped))
    assert set(kept[0.5]) < set(kept[0.8]) < set(kept[1.0])
    assert [len(kept[share]) for share in (0.0, 1.0)] == [0, 400]
    assert 150 < len(kept[0.5]) < 250 and 290 < len(kept[0.8]) < 350
    two = write_lines(tmp_path / "b.jsonl", [page([[0.9, 0.1], [0.1, 0.9]])])
    assert isinstance(read("mmc4", two, FormatOptions(keep_single_image=0.0))[0], Conversation)


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"text_list": ["s0", 1.5]}, "text_list"),
        ({"text_list": []}, "text_list"),
        ({"image_info": []}, "image_info"),
        ({"similarity_matrix": [[0.9]]}, "text_list"),
        ({"similarity_matrix": [["0.9", 0.1]]}, "numbers"),
        ({"similarity_matrix": [[True, 0.1]]}, "numbers"),
        ({"similarity_matrix": [[float("nan"), 0.1]]}, "finite"),
        ({"similarity_matrix": [[10**400, 0.1]]}, "finite"),
        ({"image_info": [7]}, "no image"),
        ({"image_info": [{}] * 600, "similarity_matrix": [[0.1, 0.1]] * 600}, "too many"),
        ({"text_list": ["<image>", " "]}, "no text"),
    ],
)
def test_pages_that_are_left_out(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [page([[0.9, 0.1]], url="https://a.b", **{}) | changed])
    (found,) = read("mmc4", path)
    assert isinstance(found, Skipped) and reason in found.reason and found.key == "https://a.b"


def embedded(image: str) -> dict[str, Any]:
    return page([[0.9, 0.1]], image_info=[{"image_name": "x.jpg", "image_base64": image}])


def test_images_within_a_tar(tmp_path: Path) -> None:
    code = base64.b64encode(heavy(1)).decode()
    pages = {
        "0.json": embedded(code),
        "1.json": embedded(code[:-2]),
        "2.json": embedded("ü" + code[1:]),
        "3.json": page([[0.9, 0.1]]),
        "4.txt": {},
        "5.json": embedded(base64.b64encode(bytes(10_999)).decode()),
        "6.json": embedded(base64.b64encode(bytes(11_000)).decode()),
    }
    path = tar(tmp_path / "a.tar", {name: json.dumps(value).encode() for name, value in pages.items()})
    found = read("mmc4", path)
    assert [isinstance(entry, Conversation) for entry in found] == [True, False, False, False, False, True]
    assert isinstance(found[0], Conversation) and isinstance(found[0].images[0], TarPlace)
    place = found[0].images[0]
    text = path.read_bytes()[place.offset : place.offset + place.length]
    assert place.encoding == "base64" and base64.b64decode(text, validate=True) == heavy(1)
    damaged = tar(tmp_path / "b.tar", {"0.json": b"{", "1.json": b"[" * 100_000})
    assert [entry.reason for entry in read("mmc4", damaged) if isinstance(entry, Skipped)] == [
        "is no JSON"
    ] * 2


def test_escaped_slashes_are_refused(tmp_path: Path) -> None:
    text = json.dumps(embedded(base64.b64encode(heavy(1)).decode())).replace("/", "\\/")
    assert "\\/" in text
    with pytest.raises(InputError, match=r"a\.tar: 0\.json: .* escapes"):
        read("mmc4", tar(tmp_path / "a.tar", {"0.json": text.encode()}))


def test_zips(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zip"
    path.write_bytes(b"PK\3\4 no zip")
    with pytest.raises(InputError, match=r"zip: the \.zip cannot be read"):
        read("mmc4", path)
    with zipfile.ZipFile(path, "w") as archive:
        for name in "ab":
            archive.writestr(name, "{}")
    with pytest.raises(InputError, match="holds 2 files"):
        read("mmc4", path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", json.dumps(page([[0.9, 0.1]])))
    data = bytearray(path.read_bytes())
    data[45] ^= 1  # within the stored file
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        read("mmc4", path)


def test_names_of_urls() -> None:
    assert url_names("https://a.b/c/d.jpg?x=/e.png#f") == ("https://a.b/c/d.jpg?x=/e.png#f", "d.jpg")
    assert url_names("https://a.b/") == ("https://a.b/",)
    assert url_names("d.jpg") == ("d.jpg",)


def write_table(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize("group", [100, 600, 5000])
def test_rows_of_every_group_come_once(tmp_path: Path, group: int) -> None:
    """Groups smaller and larger than a chunk, read by two readers in turn as two processes do."""
    count = 1500
    columns = {
        "images": [[f"https://a.b/{i}.jpg", None] for i in range(count)],
        "texts": [[None, f"text {i} " * 50] for i in range(count)],
    }
    path = write_table(tmp_path / "a.parquet", columns, row_group_size=group, data_page_size=2000)
    first, second = make_format("obelics", ALL), make_format("obelics", ALL)
    found = [
        entry
        for number, chunk in enumerate(first.chunks([path]))
        for entry in (first, second)[number % 2].read(chunk)
    ]
    assert [entry.position for entry in found] == list(range(count))
    texts = [entry.turns[0].text.split(" ")[1] for entry in found if isinstance(entry, Conversation)]
    assert texts == [str(i) for i in range(count)]
    again = next(first.chunks([path]))
    assert next(first.read(again)).key == "0"


def test_parquet_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = {"images": [["u"]], "texts": [["t"]]}
    cases = [
        ({"images": [["u"]]}, 'no column "texts"'),
        (good | {"texts": ["t"]}, 'no column "texts" of lists'),
        ({name: pyarrow.array([], pyarrow.list_(pyarrow.string())) for name in good}, "holds no rows"),
    ]
    for columns, message in cases:
        with pytest.raises(InputError, match=message):
            read("obelics", write_table(tmp_path / "a.parquet", columns))
    numbers = write_table(tmp_path / "a.parquet", good | {"texts": [[1.5]], "images": [[b"u"]]})
    assert [type(entry) for entry in read("obelics", numbers)] == [Skipped]
    for data in (b"", b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1"):
        (tmp_path / "b.parquet").write_bytes(data)
        with pytest.raises(InputError, match=r"b\.parquet: cannot be read as parquet"):
            read("obelics", tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"no\.parquet: cannot be read"):
        read("obelics", tmp_path / "no.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"install megamm with the extra \[hf\]"):
        read("obelics", numbers)


def test_damaged_parquet(tmp_path: Path) -> None:
    columns = {"images": [["u" * 50, None]] * 500, "texts": [[None, "text"]] * 500}
    good = write_table(tmp_path / "a.parquet", columns, compression="snappy").read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for number in range(150):
        data = bytearray(good)
        for _ in range(4):
            data[draw.integers(len(data))] = draw.integers(256)
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(data)
        try:
            read("obelics", path)
        except InputError as error:
            refused += str(path) in str(error)
    assert refused > 50
