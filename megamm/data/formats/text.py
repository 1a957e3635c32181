"""Plain text to learn: .txt files, or JSON lines (or a list) of {"text": ...}."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.base import Chunk
from megamm.data.formats.fields import Fields, encodable, plain
from megamm.data.formats.records import RecordFormat
from megamm.data.templates import Turn
from megamm.errors import InputError

MAX_FILE = 1 << 26  # bytes of a .txt file


class Text(RecordFormat):
    """A .txt file is one document, of any other file each entry. `<image>` in a text is dropped."""

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            if path.suffix == ".txt":
                yield Chunk(str(path), number, None)
            else:
                yield from (chunk._replace(source_number=number) for chunk in super().chunks([path]))

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        if chunk.payload is None:
            path = Path(chunk.source)
            yield _document(path.name, 0, _contents(path))
        else:
            yield from super().read(chunk)

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key = entry.identifier("id") if entry.entry.get("id") not in (None, "") else str(position)
        text = entry.entry.get("text")
        if not isinstance(text, str) or not encodable(text):
            raise entry.problem("text", "a text")
        return _document(key, position, text)


def _document(key: str, position: int, text: str) -> Conversation | Skipped:
    text = plain(text)
    if not text.strip():
        return Skipped(key, position, "has no text")
    return Conversation(key, position, [], [Turn("document", text)])


def _contents(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise InputError(
                f"{path}: has more than {MAX_FILE} bytes, and a .txt file is one document; write a line "
                '{"text": ...} for each document to a .jsonl file'
            )
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; convert it to UTF-8") from None
