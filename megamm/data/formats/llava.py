"""LLaVA's conversation files.

A JSON list, or JSON lines, of {"id", "image" (optional: a path, or a list of paths), "conversations":
[{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.conversation import Conversation, ImageRef
from megamm.data.formats.base import CHUNK_ENTRIES, Chunk, Format
from megamm.data.json_entries import iter_entries
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Llava(Format):
    """LLaVA's conversations.

    An answer before the first question and a question after the last answer teach nothing and are
    dropped, as LLaVA does with the former.
    """

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            entries: list[Any] = []
            first = 0
            for entry in iter_entries(path):
                entries.append(entry)
                if len(entries) == CHUNK_ENTRIES:
                    yield Chunk(str(path), number, (first, entries))
                    first, entries = first + len(entries), []
            if not first and not entries:
                raise InputError(f"{path}: holds no entries; give a list of conversations in LLaVA's format")
            if entries:
                yield Chunk(str(path), number, (first, entries))

    def read(self, chunk: Chunk) -> Iterator[Conversation]:
        first, entries = chunk.payload
        for position, entry in enumerate(entries, start=first):
            where = f"{chunk.source}: entry {position + 1}"
            if not isinstance(entry, dict):
                raise InputError(
                    f"{where}: is no JSON object; give a list of conversations in LLaVA's format"
                )
            key = str(entry.get("id", position))
            yield _conversation(entry, key, position, f"{where} (id {key!r})")


def _conversation(entry: dict[str, Any], key: str, position: int, where: str) -> Conversation:
    images = _images(entry.get("image"), where)
    turns = _turns(entry.get("conversations"), where)
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if placeholders != len(images):
        raise InputError(
            f"{where}: has {placeholders} {IMAGE_TOKEN} placeholders and {len(images)} images; "
            f"write one {IMAGE_TOKEN} for every image of the entry, in its questions"
        )
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role == "assistant"):
        raise InputError(f"{where}: has an {IMAGE_TOKEN} placeholder in an answer; move it to the question")
    return Conversation(key, position, images, turns)


def _images(value: Any, where: str) -> list[ImageRef]:
    images = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for name in images:
        if not isinstance(name, str) or not name or not _encodable(name):
            raise InputError(f'{where}: "image" must be a path or a list of paths; correct the entry')
    return images


def _turns(value: Any, where: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise InputError(f'{where}: has no "conversations"; add a question and an answer')
    turns = [_turn(item, f"{where}, turn {i + 1}") for i, item in enumerate(value)]
    if turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    if not turns:
        raise InputError(f"{where}: has no question with an answer; add one")
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise InputError(
                f"{where}: questions and answers do not alternate; join or remove the turns that repeat"
            )
    return turns


def _turn(item: Any, where: str) -> Turn:
    if not isinstance(item, dict) or not isinstance(item.get("value"), str):
        raise InputError(f'{where}: must be an object with "from" and a text "value"; correct the entry')
    role = ROLES.get(str(item.get("from")))
    if role is None:
        raise InputError(f'{where}: "from" is {item.get("from")!r}; use "human" or "gpt"')
    if not _encodable(item["value"]):
        raise InputError(f"{where}: its text holds half of a surrogate pair; correct the text")
    return Turn(role, item["value"])  # type: ignore[arg-type]


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
