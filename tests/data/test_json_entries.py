"""Streaming JSON: the same as json.load, in small pieces, and mistakes with their position."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megamm.data import json_entries
from megamm.data.json_entries import iter_entries
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
