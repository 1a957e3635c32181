"""Sets of instructions: the words that a recipe adds to captions and short questions, by their task.

They are data (`presets/instructions.yaml`) and applied before the template. With several questions in a
conversation the first one carries them, as in LLaVA-1.5's mixture.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml

from megamm.data.conversation import Conversation
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError

NONE = "none"
_PATH = Path(__file__).parent / "presets" / "instructions.yaml"
_PLACES = re.compile(rf"(?:{re.escape(IMAGE_TOKEN)}\s*)*")


def names() -> list[str]:
    """The sets there are, and "none", which leaves every conversation as it is."""
    return [*_sets(), NONE]


def apply(set_name: str, conversation: Conversation) -> Conversation:
    """The conversation with the words of the set for its task.

    Raises:
        InputError: there is no such set.
    """
    if set_name not in names():
        raise InputError(f"instructions: there is no {set_name!r}; choose one of {', '.join(names())}")
    words = _sets().get(set_name, {}).get(conversation.task)
    if words is None or not conversation.turns or conversation.turns[0].role != "user":
        return conversation
    first, *others = conversation.turns
    return conversation._replace(turns=[first._replace(text=_asked(first.text, words)), *others])


def _asked(text: str, words: dict[str, str]) -> str:
    places = _PLACES.match(text)
    assert places is not None, "the pattern matches nothing too"
    question = text[places.end() :]
    if not question:
        question = words.get("question", "")
        images = [IMAGE_TOKEN] * text.count(IMAGE_TOKEN)
        return "\n".join([*images, question]) if question else text
    return places[0] + words.get("before", "") + question + words.get("after", "")


@cache
def _sets() -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(_PATH.read_text(encoding="utf-8"))
    return found
