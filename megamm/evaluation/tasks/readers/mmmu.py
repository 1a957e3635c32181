"""MMMU: rows of {"id", "question", "options", "answer", "question_type", "image_1" ... "image_7"}, as the
parquet files of its release (one folder per subject) or as JSON lines.

"options" is a list, or one in Python's notation. A picture is {"bytes", "path"} in parquet; in JSON lines the
name of a file, or {"bytes" (base64), "path"}. `<image 3>` in the question or an option is the place of
"image_3".
"""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.formats.fields import Fields, is_name, plain
from megamm.data.formats.records import MAX_CHOICES, letter
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError
from megamm.evaluation.tasks.files import entries, fields, roots, there
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders, Source, Spool

_PATTERNS = ("*validation*.parquet", "*/validation*.parquet", "*validation*.jsonl", "*.jsonl")
_PLACE = re.compile(r"<image (\d+)>")
_ROWS_AT_ONCE = 32


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions, subject by subject; of a folder those of the validation split."""
    spool, folders = Spool(), Folders(roots(data, images), ("images",))
    for path in _files(data):
        for entry in _parquet(path) if path.suffix == ".parquet" else entries(path, word="line"):
            yield _item(entry, spool, folders)


def _files(data: Sequence[Path]) -> Iterator[Path]:
    for path in data:
        if not there(path).is_dir():
            yield path
            continue
        found = next((f for pattern in _PATTERNS if (f := sorted(path.glob(pattern)))), None)
        if found is None:
            raise InputError(f"{path}: holds no {' nor '.join(_PATTERNS)}; give the files with --data")
        yield from found


def _parquet(path: Path) -> Iterator[Fields]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f'{path}: reading parquet needs pyarrow; pip install "megamm[hf]"') from None
    try:
        with ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield fields(row, f"{path}: row {number}")
    except (ArrowInvalid, OSError) as error:
        reason = str(error).partition(".")[0]
        raise InputError(f"{path}: cannot be read as parquet ({reason}); copy it again") from None


def _item(entry: Fields, spool: Spool, folders: Folders) -> Item:
    key, is_open = entry.identifier("id"), entry.entry.get("question_type") == "open"
    options = [] if is_open else _options(entry)
    held = {n: value for n in range(1, 8) if (value := entry.entry.get(f"image_{n}")) is not None}
    question, choices, shown = _placed(entry.text("question"), options, set(held))
    pictures = tuple(_picture(entry, n, held[n], spool, folders) for n in shown)
    answers = _answers(entry, is_open, len(options))
    reference: dict[str, Any] | None = None
    if answers:
        reference = {"label": answers[0] if len(answers) == 1 else answers}
        reference |= {"question_type": "open" if is_open else "multiple-choice", "options": options}
    return Item(
        id=key,
        kind="mmmu_open" if is_open else "mmmu",
        question=question,
        images=pictures,
        choices=tuple(choices),
        answer=answers[0] if answers else "",
        reference=reference,
        submission={"id": key, "options": options},
    )


def _options(entry: Fields) -> list[str]:
    value = _literal(entry.entry.get("options"))
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_CHOICES:
        raise entry.problem("options", f"a list of at most {MAX_CHOICES} texts")
    return [plain(str(option)).strip() for option in value]


def _literal(value: Any) -> Any:
    """A value in Python's notation, where `value` is a text in that; otherwise `value`."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def _answers(entry: Fields, is_open: bool, num_options: int) -> list[str]:
    """The right letter, or all texts that count as right; empty where the answer is kept secret ("?")."""
    value = entry.entry.get("answer")
    several = _literal(value) if isinstance(value, str) and value.startswith("[") else value
    if is_open and isinstance(several, list):
        return [str(each).strip() for each in several]
    found = entry.text_or_none("answer")
    if found in ("", "?"):
        return []
    if not is_open and found not in map(letter, range(num_options)):
        raise entry.problem("answer", f"the letter of one of {num_options} options")
    return [found]


def _placed(question: str, options: list[str], held: set[int]) -> tuple[str, list[str], list[int]]:
    """Question and options with `<image>` at the places of pictures, and the numbers of those pictures in
    their order. Pictures without a place stand before the question."""
    texts = [question, *options]
    named = [int(number) for text in texts for number in _PLACE.findall(text)]
    shown = [number for number in named if number in held]
    front = sorted(held - set(shown))

    def place(match: re.Match[str]) -> str:
        return IMAGE_TOKEN if int(match[1]) in held else match[0]

    texts = [_PLACE.sub(place, text) for text in texts]
    texts[0] = f"{IMAGE_TOKEN}\n" * len(front) + texts[0]
    return texts[0], texts[1:], front + shown


def _picture(entry: Fields, number: int, value: Any, spool: Spool, folders: Folders) -> Source:
    name = f"{entry.where} (image_{number})"
    if is_name(value):
        return folders.picture(value)
    data = value.get("bytes") if isinstance(value, dict) else None
    if isinstance(data, str):
        try:
            data = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"{name}: is no base64; copy the file again") from None
    if isinstance(data, bytes):
        return spool.keep(data, name)
    if isinstance(value, dict) and is_name(value.get("path")):
        return folders.picture(value["path"])
    raise InputError(f'{name}: is no picture; give the name of a file, or {{"bytes", "path"}}')
