"""MMBench: a table with tabs between the columns index, question, hint, A to D, answer, category,
l2-category, split and image (base64). Test splits have no answer. In some releases a row's image is the index
of the row that holds it."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megamm.data.formats.fields import plain
from megamm.data.json_entries import MAX_ENTRY, open_text
from megamm.errors import InputError
from megamm.evaluation.tasks.files import named_or_found
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Kept, Spool

LETTERS = ("A", "B", "C", "D")
_FILES = ("*dev*.tsv", "*DEV*.tsv", "*.tsv")
_NEEDED = ("index", "question", "image", *LETTERS[:2])
_LONGEST_INDEX = 64
Row = Mapping[str, str]


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The rows in their order. Rotations of a question (index differing by a million) are rows "
    "of their own."""
    spool = Spool()
    for path in named_or_found(data, _FILES):
        seen: dict[str, Kept] = {}
        waiting: list[tuple[Row, str]] = []
        for line, row in _rows(path):
            where = f"{path}: line {line}"
            index = _cell(row, "index", where)
            if not index.isdecimal():
                raise InputError(f"{where}: index is {index[:40]!r}; it must be a whole number")
            picture = _cell(row, "image", where)
            if len(picture) > _LONGEST_INDEX:
                seen[index] = spool.keep(_decoded(picture, where), f"{path} (index {index})")
            waiting.append(({key: row.get(key) or "" for key in row if key != "image"}, picture))
        for number, (kept, cell) in enumerate(waiting, start=1):
            where = f"{path}: row {number}"
            yield _item(kept, _picture(kept, cell, seen, where), where)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row, quoted as spreadsheets do."""
    limit = csv.field_size_limit(MAX_ENTRY)
    try:
        with open_text(path) as file:
            table = csv.DictReader(file, delimiter="\t")
            missing = [name for name in _NEEDED if name not in (table.fieldnames or ())]
            if missing:
                raise InputError(f"{path}: has no column {missing[0]!r}; give a .tsv of MMBench")
            for row in table:
                yield table.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}: cannot be read as a table ({error}); copy it again") from None
    finally:
        csv.field_size_limit(limit)


def _cell(row: Row, key: str, where: str) -> str:
    value = (row.get(key) or "").strip()
    if not value:
        raise InputError(f"{where}: has no {key}; copy the file again from the release")
    return value


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: its image is no base64; copy the file again from the release") from None


def _picture(row: Row, cell: str, seen: Mapping[str, Kept], where: str) -> Kept:
    key = row["index"].strip() if len(cell) > _LONGEST_INDEX else cell
    if key not in seen:
        raise InputError(
            f"{where}: its image is that of index {key[:20]!r}, which the file does not hold; copy it again"
        )
    return seen[key]


def _item(row: Row, picture: Kept, where: str) -> Item:
    options: dict[str, str] = {}
    for letter in LETTERS:
        text = plain((row.get(letter) or "").strip())
        if text.lower() in ("", "nan", "none"):  # what tables write where there is nothing
            break
        options[letter] = text
    label = (row.get("answer") or "").strip().upper()
    if label and label not in options:
        raise InputError(f"{where}: the answer is {label[:20]!r}; it must be one of {', '.join(options)}")
    hint = plain((row.get("hint") or "").strip())
    reference = {"label": label, **options}
    for key in ("category", "l2-category", "split"):
        if value := (row.get(key) or "").strip():
            reference[key] = value
    return Item(
        id=row["index"].strip(),
        kind="mmbench",
        question=plain(_cell(row, "question", where)),
        images=(picture,),
        choices=tuple(options.values()),
        hint="" if hint.lower() in ("nan", "none") else hint,
        answer=label,
        reference=reference if label else None,
        submission={
            key: row.get(key) or ""
            for key in ("index", "question", *LETTERS, "answer", "split")
            if key in row
        },
    )
