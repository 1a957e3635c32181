"""LLaVA's conversation files.

A JSON list, or JSON lines, of {"id", "image" (optional: a path, or a list of paths), "conversations":
[{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}, ...]}.
"""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, ImageRef
from megamm.data.formats.dialogue import alternates, trimmed
from megamm.data.formats.fields import encodable
from megamm.data.formats.records import RecordFormat
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class Llava(RecordFormat):
    """LLaVA's conversations.

    An answer before the first question and a question after the last answer teach nothing and are
    dropped, as LLaVA does with the former.
    """

    def entry(self, value: Any, position: int, where: str) -> Conversation:
        if not isinstance(value, dict):
            raise InputError(f"{where}: is no JSON object; give a list of conversations in LLaVA's format")
        key = _key(value.get("id"), position, where)
        return _conversation(value, key, position, f"{where} (id {key!r})")


def _key(value: Any, position: int, where: str) -> str:
    """The id of an entry, whatever it is, as text."""
    key = str(position) if value is None else value if isinstance(value, str) else ascii(value)
    if not encodable(key):
        raise InputError(f'{where}: "id" holds half of a surrogate pair; correct the entry')
    return key


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
        if not isinstance(name, str) or not name or not encodable(name):
            raise InputError(f'{where}: "image" must be a path or a list of paths; correct the entry')
    return images


def _turns(value: Any, where: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise InputError(f'{where}: has no "conversations"; add a question and an answer')
    turns = [_turn(item, f"{where}, turn {i + 1}") for i, item in enumerate(value)]
    if not (turns := trimmed(turns)):
        raise InputError(f"{where}: has no question with an answer; add one")
    if not alternates(turns):
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
    if not encodable(item["value"]):
        raise InputError(f"{where}: its text holds half of a surrogate pair; correct the text")
    return Turn(role, item["value"])  # type: ignore[arg-type]
