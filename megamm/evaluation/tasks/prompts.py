"""From an item to the words of its prompt. The words are data: presets/prompts.yaml, which says "
"what they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from megamm.data.formats.records import letter
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError
from megamm.evaluation.tasks.item import Item

PRESETS = Path(__file__).parents[1] / "presets" / "prompts.yaml"
_PIECE = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Words:
    """How one kind of question is asked; see presets/prompts.yaml."""

    ask: str
    shot: str = ""
    choice: str = ""
    hint: str = ""
    ocr: str = ""
    drop: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shots:
    """How demonstrations are put together; see presets/prompts.yaml."""

    join: str
    blind: int


@dataclass(frozen=True)
class Prompts:
    """A set of words.

    Attributes:
        shots: None for sets that are asked in the template of the recipe.
    """

    name: str
    templates: tuple[str, ...]
    decoding: Mapping[str, Any]
    kinds: Mapping[str, Words]
    shots: Shots | None = None

    def of(self, kind: str, task: str) -> Words:
        """The words for a kind of question; raises InputError, naming the task, if the set has none."""
        if kind not in self.kinds:
            able = ", ".join(name for name, other in load_prompts().items() if kind in other.kinds)
            raise InputError(f"--prompts: {self.name} has no words for --task {task}; use one of {able}")
        return self.kinds[kind]


@cache
def load_prompts() -> Mapping[str, Prompts]:
    """All sets by name."""
    contents = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    return {name: _prompts(name, entry) for name, entry in contents.items()}


def _prompts(name: str, entry: dict[str, Any]) -> Prompts:
    kinds = {kind: _words(words) for kind, words in entry["kinds"].items()}
    shots = Shots(**entry["shots"]) if "shots" in entry else None
    return Prompts(name, tuple(entry["templates"]), entry["decoding"], kinds, shots)


def _words(entry: dict[str, Any]) -> Words:
    found: dict[str, Any] = dict(entry)
    for key in ("drop", "end"):
        found[key] = tuple(entry.get(key, ()))
    return Words(**found)


def choose_prompts(name: str | None, template: str, with_shots: bool) -> Prompts:
    """The set of that name; without one, the first that has the recipe's template, or demonstrations if those
    are asked for.

    Raises:
        InputError: there is no such set.
    """
    sets = load_prompts()
    if name is None:
        fitting = [each for each in sets.values() if _goes_with(each, template, with_shots)]
        if not fitting:
            raise InputError(
                f"--prompts: none go with the recipe's template {template}; choose one of {', '.join(sets)}"
            )
        return fitting[0]
    if name not in sets:
        raise InputError(f"--prompts: there is no {name!r}; choose one of {', '.join(sets)}")
    return sets[name]


def _goes_with(prompts: Prompts, template: str, with_shots: bool) -> bool:
    return prompts.shots is not None if with_shots else template in prompts.templates


def question_text(words: Words, item: Item) -> str:
    """What a conversation asks, with one `<image>` for each picture."""
    question = item.question
    for unwanted in words.drop:
        question = question.replace(unwanted, "").strip()
    hint = fill(words.hint, {"text": item.hint}) if item.hint else ""
    ocr = "" if item.ocr is None else fill(words.ocr, {"text": ", ".join(item.ocr)})
    pieces = {"question": question, "choices": _choices(words, item.choices), "hint": hint, "ocr": ocr}
    text = fill(words.ask, pieces)
    missing = len(item.images) - text.count(IMAGE_TOKEN)
    return f"{IMAGE_TOKEN}\n" * missing + text if text else IMAGE_TOKEN * missing


def _choices(words: Words, choices: Sequence[str]) -> str:
    lines = [fill(words.choice, {"letter": letter(i), "text": text}) for i, text in enumerate(choices)]
    return "\n".join(lines)


def fill(pattern: str, pieces: Mapping[str, str]) -> str:
    """`pattern` with its pieces in braces filled in; what is filled in is not looked at again."""
    return _PIECE.sub(lambda match: pieces[match[1]], pattern)
