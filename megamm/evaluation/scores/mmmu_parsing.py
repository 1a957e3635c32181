"""How MMMU's evaluator reads answers (eval_utils.py of github.com/MMMU-Benchmark/MMMU), with its oddities.

Multiple choice: the last "(A)" in the answer; without any, the last " A "; without any, and with more than
five words, the option whose text stands last in it. Open: the ends of its lines behind words that introduce a
result, and the numbers in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_STRIPPED = (",", ".", "!", "?", ";", ":", "'")
_MANY_WORDS = 5  # an answer has to have more before options are looked for by their texts
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset({":", ",", ".", "!", "?", ";", "'"})
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # the rest
)


def choice_of(response: str, options: Mapping[str, str | None]) -> str | None:
    """The letter that an answer to a multiple-choice question names; None if there is none.

    Args:
        options: letter -> text, None where it is not known.
    """
    for mark in _STRIPPED:
        response = response.strip(mark)
    text = f" {response} "
    found = _last(text, {letter: f"({letter})" for letter in options})
    found = found or _last(text, {letter: f" {letter} " for letter in options})
    if found is None and len(text.split()) > _MANY_WORDS:
        known = {letter: option.lower() for letter, option in options.items() if option is not None}
        found = _last(text.lower(), known)
    return found


def _last(text: str, sought: Mapping[str, str]) -> str | None:
    """The key whose text begins last; the first of those that begin together."""
    places = {key: text.rfind(part) for key, part in sought.items() if part in text}
    return max(places, key=lambda key: places[key], default=None)


def open_answers(response: str) -> set[str | float]:
    """The texts and numbers that an answer to an open question may mean."""
    candidates = _key_parts(response)
    numbers = [number for part in candidates for pattern in _NUMBERS for number in pattern.findall(part)]
    return {form for candidate in [*candidates, *numbers] for form in forms(candidate)}


def matches(given: Iterable[str | float], expected: Sequence[str]) -> bool:
    """Whether one of the numbers is expected, or one of the texts contains an expected text."""
    wanted = [form for one in expected for form in forms(one)]
    texts = [form for form in wanted if isinstance(form, str)]
    for one in given:
        if isinstance(one, str):
            if any(text in one for text in texts):
                return True
        elif one in wanted:
            return True
    return False


def forms(text: str) -> list[str | float]:
    """An answer as it is compared: numbers with two decimals, texts in small letters. A single letter has to
    stand beside a space, or it would be found in every word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_parts(response: str) -> list[str]:
    """What stands behind the last of the introducing words, in each line; the whole answer if nothing does.

    (The evaluator means to split sentences, too, but looks for their capitals after it has made all letters
    small.)
    """
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    parts = []
    for number, line in enumerate(lines, start=1):
        indicators = (
            _INDICATORS if number < len(lines) else (*_INDICATORS, "=")
        )  # only the last may be an equation
        if (part := _shortest_tail(line, indicators)) and part not in _TRIVIAL:
            parts.append(part)
    return parts or [text]


def _shortest_tail(line: str, indicators: Sequence[str]) -> str:
    """The shortest of the texts behind the last of each indicator; an empty one gives way to any later
    one."""
    shortest = ""
    for indicator in indicators:
        if indicator in line:
            tail = line.rpartition(indicator)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest
