"""Rows of predictions and references, read from JSON lines, JSON lists and the benchmarks' own files.

| layout | example |
|---|---|
| JSON lines | `{"id": 1, "prediction": "a cat"}` |
| JSON list | `[{"question_id": 1, "answer": "a cat"}, ...]`, `[{"image_id": 1, "caption": "a cat"}, ...]` |
| object with a list below "annotations" | the annotation files of VQA and COCO captions |
| object with an entry below each id | the questions of GQA, the results of MMMU |
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megamm.data.json_entries import MAX_ENTRY, find_key, iter_entries, iter_items, open_text
from megamm.errors import InputError

ID_KEYS = ("id", "question_id", "questionId", "image_id", "index", "image")
PREDICTION_KEYS = ("prediction", "answer", "caption", "text")
_OF_A_ROW = {*ID_KEYS, *PREDICTION_KEYS, "answers", "references", "label"}
_LISTED = "annotations"


class Row(dict[str, Any]):
    """A row that knows where it stands: `path`, and `number` (from 1) of the `unit`, line or entry."""

    __slots__ = ("number", "path", "unit")

    def __init__(self, values: dict[str, Any], path: Path, number: int, unit: str):
        super().__init__(values)
        self.path, self.number, self.unit = path, number, unit

    @property
    def place(self) -> str:
        return f"{self.path}: {self.unit} {self.number}"


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file.

    Raises:
        InputError: unreadable, wrong JSON (with its line), a row that is no object, no rows at all.
    """
    found = list(_rows(Path(path)))
    if not found:
        raise InputError(f"{path}: holds no rows; give JSON lines, one object for each question")
    return found


def _rows(path: Path) -> Iterator[Row]:
    first = _first_character(path)
    if first not in ("[", "{", ""):
        raise InputError(f"{path}: begins with {first!r}, which is no JSON; give JSON lines or a JSON list")
    if first == "[":
        yield from _listed(path, iter_entries(path))
    elif first == "{" and find_key(path, [_LISTED]):
        yield from _listed(path, iter_entries(path, _LISTED))
    elif first == "{" and _is_one_object(path):
        yield from _items(path)
    else:
        yield from _lines(path)


def _first_character(path: Path) -> str:
    with open_text(path) as file:
        while text := file.read(1024):
            if stripped := text.lstrip():
                return stripped[0]
    return ""


def _is_one_object(path: Path) -> bool:
    """Whether the file is one object, over many lines or without an id of its own."""
    with open_text(path) as file:
        lines = (line for line in iter(lambda: file.readline(MAX_ENTRY), "") if not line.isspace())
        first, *others = islice(lines, 2)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        # a mistake in the first of many JSON lines, or an object over many lines
        return first.strip() == "{" or not others or _goes_on(others[0])
    return not others and isinstance(row, dict) and _OF_A_ROW.isdisjoint(row)


def _goes_on(line: str) -> bool:
    """Whether a line cannot begin an entry of its own."""
    return not line.lstrip().startswith("{")


def _lines(path: Path) -> Iterator[Row]:
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ENTRY), ""), start=1):
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}: line {number}, column {error.colno}: {error.msg}; correct the JSON there"
                ) from None
            except (RecursionError, ValueError) as error:
                raise InputError(
                    f"{path}: line {number}: cannot be held ({error}); correct the JSON there"
                ) from None
            yield _row(value, path, number, "line")


def _listed(path: Path, entries: Iterator[Any]) -> Iterator[Row]:
    for number, value in enumerate(entries, start=1):
        yield _row(value, path, number, "entry")


def _items(path: Path) -> Iterator[Row]:
    for number, (key, value) in enumerate(iter_items(path), start=1):
        given = {"prediction": value} if isinstance(value, str) else value
        yield _row({"id": key, **given} if isinstance(given, dict) else given, path, number, "entry")


def _row(value: Any, path: Path, number: int, unit: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {unit} {number}: is no JSON object; give one with an id for each question")
    answers = value.get("answers")
    if isinstance(answers, list):  # two million of them in VQAv2: only the texts are kept
        value["answers"] = [_answer(one) for one in answers]
    return Row(value, path, number, unit)


def _answer(value: Any) -> Any:
    text = value.get("answer") if isinstance(value, dict) else value
    return sys.intern(text) if isinstance(text, str) else value
