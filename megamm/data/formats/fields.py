"""Typed access to the entries of source files: whatever is no such thing is an InputError that names it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeGuard

from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError

_INTEGERS = 1 << 63


class Fields:
    """A JSON object of a source file; `where` names it in errors."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise InputError(f"{where}: is no JSON object; check that the file has the layout of --format")
        self.entry, self.where = value, where

    def problem(self, key: str, wanted: str) -> InputError:
        """That the value of `key` is not what it must be."""
        have = f'"{key}" is {_short(self.entry[key])}' if key in self.entry else f'has no "{key}"'
        return InputError(f"{self.where}: {have}; it must be {wanted}")

    def text(self, key: str) -> str:
        """A text that is not blank, without placeholders and white space around it."""
        found = words(self.entry.get(key))
        if not found:
            raise self.problem(key, "a text")
        return found

    def text_or_none(self, key: str) -> str:
        """As `text`; "" where the key is absent, null or blank."""
        value = self.entry.get(key)
        found = words(value)
        if found is None and value is not None:
            raise self.problem(key, "a text")
        return found or ""

    def identifier(self, key: str) -> str:
        """A whole number or a text that names something."""
        value = self.entry.get(key)
        found = words(value) if isinstance(value, str | int) else None
        if not found or len(found) > 1000:
            raise self.problem(key, "a whole number or a name")
        return found

    def number(self, key: str) -> int:
        """A whole number that is not negative."""
        value = self.entry.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _INTEGERS:
            raise self.problem(key, "a whole number, 0 or greater")
        return value

    def name(self, key: str) -> str:
        """The name of an image."""
        value = self.entry.get(key)
        if not is_name(value):
            raise self.problem(key, "the name of an image")
        return value

    def listed(self, key: str) -> list[Any]:
        """A list."""
        value = self.entry.get(key)
        if not isinstance(value, list):
            raise self.problem(key, "a list")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts (or whole numbers), without placeholders and white space around them."""
        found = [words(value) for value in self.listed(key)]
        if None in found:
            raise self.problem(key, "a list of texts")
        return found  # type: ignore[return-value]


def keyed(value: Any, where: str) -> tuple[str, Fields]:
    """The key and the fields of an entry that stands below its key."""
    key, record = value
    if not is_name(key):
        raise InputError(f"{where}: its key is {_short(key)}; it must be a name")
    return key, Fields(record, f"{where} ({_short(key)})")


def words(value: Any) -> str | None:
    """A text without placeholders of images and white space around it, a whole number as text; None for
    anything else."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _INTEGERS:
        return str(value)
    if not isinstance(value, str) or not encodable(value):
        return None
    return plain(value).strip()


def plain(text: str) -> str:
    """`text` without `<image>`: what a text of a data set says is no place for an image."""
    while IMAGE_TOKEN in text:  # again, for what closes up to a placeholder
        text = text.replace(IMAGE_TOKEN, "")
    return text


def is_name(value: Any) -> TypeGuard[str]:
    """Whether `value` may be the name of an image."""
    return isinstance(value, str) and bool(value) and encodable(value)


def encodable(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def most_frequent(answers: Iterable[str]) -> str:
    """The answer given most often, the first of those on a tie; "" if all are blank."""
    counts = Counter(answer for answer in answers if answer)
    return max(counts, key=counts.__getitem__, default="")


def _short(value: Any) -> str:
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a number with more digits than Python writes
        text = "something else"
    return text if len(text) <= 40 else text[:37] + "..."
