"""Streaming JSON: the same as json.load, in small pieces, and mistakes with their position."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamm.data import json_entries
from megamm.data.json_entries import (
    Block,
    decode_block,
    entry_blocks,
    find_key,
    item_blocks,
    iter_entries,
    iter_items,
)
from megamm.errors import InputError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=[1, 7, 1 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks so small that everything is cut everywhere."""
    monkeypatch.setattr(json_entries, "CHUNK", request.param)
    return request.param


VALUES = [
    {"id": 1, "text": 'é "quoted" \\ [ ] { } , \n'},
    [],
    {},
    12345678901234567890,
    -1.5e-7,
    True,
    None,
    "",
    "x" * 500,
    {"deep": [[{"a": [1, 2, {"b": None}]}]]},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_lists_and_lines(tmp_path: Path, chunk: int, indent: int | None, ascii_only: bool) -> None:
    values = [v for v in VALUES for _ in range(2)]
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    assert list(iter_entries(write(tmp_path / "a.json", f" \n{text}\n "))) == values
    objects = [v for v in values if isinstance(v, dict)]
    lines = "\n".join(json.dumps(v, ensure_ascii=ascii_only) for v in objects)
    assert list(iter_entries(write(tmp_path / "a.jsonl", lines))) == objects
    assert list(iter_entries(write(tmp_path / "b.jsonl", lines + "\n\n"))) == objects


def test_empty(tmp_path: Path, chunk: int) -> None:
    for text in ("", " \n ", "[]", " [ ] "):
        assert list(iter_entries(write(tmp_path / "a.json", text))) == []


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('[\n {"a": 1},\n {"a" 2}\n]', 3, 7),
        ('[{"a": 1}\n {"a": 2}]', 2, 2),
        ("[1, 2\n", 2, 1),
        ("[1, ]", 1, 5),
        ("[1] 2", 1, 5),
        ('{"a": 1}\n{"a": }\n', 2, 7),
        ('{"a": "open', 1, 7),
        ("nonsense", 1, 1),
        ("[1, 2" + " " * 300 + "oops" + " " * 300 + "]", 1, 306),
    ],
)
def test_mistakes_have_a_position(tmp_path: Path, chunk: int, text: str, line: int, column: int) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(InputError, match="correct the JSON") as caught:
        list(iter_entries(path))
    assert str(caught.value).startswith(f"{path}: line {line}, column {column}: ")


def test_hostile_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no.json: cannot be read"):
        list(iter_entries(tmp_path / "no.json"))
    (tmp_path / "latin.json").write_bytes(b'[{"a": "\xff\xfe"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        list(iter_entries(tmp_path / "latin.json"))
    for text in ("[" * 200_000, '{"a":' * 100_000, "[" + "9" * 50_000 + "]"):
        with pytest.raises(InputError, match="line 1"):
            list(iter_entries(write(tmp_path / "deep.json", text)))


def test_an_endless_entry_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_entries, "CHUNK", 1000)
    monkeypatch.setattr(json_entries, "MAX_ENTRY", 10_000)
    path = write(tmp_path / "a.json", '[{"a": "' + "x" * 1_000_000)
    with pytest.raises(InputError, match="line 1, column 8"):
        list(iter_entries(path))


def test_random_damage_is_our_error_or_none(tmp_path: Path) -> None:
    draw = random.Random(3)
    text = json.dumps(VALUES, indent=1)
    for number in range(300):
        data = bytearray(text.encode())
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{number}.json"
        path.write_bytes(data)
        try:
            wanted = json.loads(data.decode())
        except ValueError:
            wanted = None
        try:
            found = list(iter_entries(path))
        except InputError:
            found = None
        if isinstance(wanted, list):
            assert found == wanted


def decoded(blocks: Iterator[Block], path: Path) -> list[tuple[int, object]]:
    return [entry for block in blocks for entry in decode_block(path, block)]


OBJECT = {
    "info": {"a": [1, {"b": 2}]},
    "skip": [[1, 2], {"x": []}, "]"],
    "none": {},
    "list": VALUES,
    "end": 1,
}


@pytest.mark.parametrize("indent", [None, 2])
def test_parts_of_an_object(tmp_path: Path, chunk: int, indent: int | None) -> None:
    path = write(tmp_path / "a.json", f" {json.dumps(OBJECT, indent=indent)}\n")
    assert list(iter_entries(path, "list")) == VALUES
    assert list(iter_entries(path, "skip")) == OBJECT["skip"]
    assert decoded(entry_blocks(path, "list"), path) == list(enumerate(VALUES))
    assert list(iter_items(path)) == list(OBJECT.items())
    assert decoded(item_blocks(path), path) == list(enumerate([k, v] for k, v in OBJECT.items()))
    assert find_key(path, ("end", "list", "absent")) == "list"
    assert find_key(path, ("a", "b", "x")) is None
    for key, message in (("info", '"info" is no list'), ("end", '"end" is no list'), ("b", 'has no "b"')):
        with pytest.raises(InputError, match=message):
            list(iter_entries(path, key))


@pytest.mark.parametrize("text", ["[1]", "1", '"a"', ""])
def test_no_object(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.json", text)
    assert find_key(path, ("a",)) is None
    for read in (lambda: iter_items(path), lambda: iter_entries(path, "a"), lambda: item_blocks(path)):
        with pytest.raises(InputError, match="is no JSON object"):
            list(read())


@pytest.mark.parametrize(
    "text, line, column",
    [
        ('{"a": 1\n "b": [2]}', 2, 2),
        ('{"a": 1,\n 5: [2]}', 2, 2),
        ('{"a"\n [2]}', 2, 2),
        ('{"b": [2, ,3]}', 1, 11),
        ('{"b": [2, 3', 1, 12),
    ],
)
def test_mistakes_in_an_object_have_a_position(
    tmp_path: Path, chunk: int, text: str, line: int, column: int
) -> None:
    path = write(tmp_path / "a.json", text)
    with pytest.raises(InputError, match=rf"a\.json: line {line}, column {column}: "):
        list(iter_entries(path, "b"))
    with pytest.raises(InputError, match=rf"line {line}, column {column}: "):
        list(iter_items(path))


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n \n"])
def test_lines_are_cut_undecoded(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ending.join(["", *(json.dumps(v) for v in VALUES if v != [])]).encode())
    wanted = list(enumerate(v for v in VALUES if v != []))
    for entries, characters in ((256, 1 << 20), (256, 1), (2, 1 << 20)):
        monkeypatch.setattr(json_entries, "BLOCK_ENTRIES", entries)
        monkeypatch.setattr(json_entries, "BLOCK_CHARACTERS", characters)
        assert decoded(entry_blocks(path), path) == wanted
    monkeypatch.setattr(json_entries, "BLOCK_CHARACTERS", 1 << 20)
    write(path, '\n{"a": 1}\n\n{"a" 2}\n{"a": 3}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: line 4, column 6: "):
        decoded(entry_blocks(path), path)


def test_blocks_of_other_layouts(tmp_path: Path, chunk: int) -> None:
    """A list, and values that go over several lines."""
    for text in (json.dumps(VALUES), "\n".join(json.dumps({"a": v}, indent=1) for v in VALUES)):
        path = write(tmp_path / "a.json", text)
        assert decoded(entry_blocks(path), path) == list(enumerate(iter_entries(path)))


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_entries, "MAX_ENTRY", 1000)
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 5000 + '"}\n')
    with pytest.raises(InputError, match="line 2, column 1: the entry has no end"):
        list(entry_blocks(path))
