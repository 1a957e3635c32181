"""Entries of a JSON list or a JSON-lines file, one at a time, in bounded memory.

A conversation file may have gigabytes; only the entry at hand is held, and a mistake is reported with
its line and column.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megamm.errors import InputError

CHUNK = 1 << 20  # characters read at once
MAX_ENTRY = 1 << 26  # characters of one entry
_WHITE = " \t\n\r"
# The decoder may be cut in the middle of a word or number; a mistake this far from the end is one.
_MARGIN = 64


def iter_entries(path: Path) -> Iterator[Any]:
    """The elements of the JSON list in `path`, or its lines if it is no list.

    Raises:
        InputError: unreadable, no UTF-8, or wrong JSON, with line and column.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _Reader(path, file).entries()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); give a JSON or JSON-lines file"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; give a JSON or JSON-lines file") from None


class _Reader:
    """A window on the text; `position` is where the next thing begins in it."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file = path, file
        self.window, self.position, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the start of the window
        self.decoder = json.JSONDecoder()

    def entries(self) -> Iterator[Any]:
        first = self.peek()
        if first == "[":
            self.position += 1
            yield from self.elements()
        else:
            while self.peek():
                yield self.value()

    def elements(self) -> Iterator[Any]:
        if self.peek() == "]":
            self.position += 1
        else:
            yield self.value()
            while (mark := self.peek()) == ",":
                self.position += 1
                self.peek()
                yield self.value()
            if mark != "]":
                raise self.problem("expected ',' or ']'", self.position)
            self.position += 1
        if self.peek():
            raise self.problem("text after the end of the list", self.position)

    def peek(self) -> str:
        """The next character that is no white space, without taking it; empty at the end."""
        while True:
            while self.position < len(self.window) and self.window[self.position] in _WHITE:
                self.position += 1
            if self.position < len(self.window):
                return self.window[self.position]
            if not self.read_more(CHUNK):
                return ""

    def value(self) -> Any:
        amount = CHUNK
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.position)
                # A number may go on in the next chunk: 1.5e-3 is taken for 1.5 if cut behind "e-".
                if end + 2 < len(self.window) or not self.read_more(amount):
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                cut = "Unterminated" in error.msg or error.pos > len(self.window) - _MARGIN
                if not cut or len(self.window) - self.position > MAX_ENTRY or not self.read_more(amount):
                    raise self.problem(error.msg, error.pos) from None
            except (RecursionError, ValueError) as error:
                raise self.problem(f"cannot be held ({error})", self.position) from None
            amount *= 2

    def read_more(self, amount: int) -> bool:
        """Drop what was taken and append up to `amount` characters; False at the end of the file."""
        text = "" if self.ended else self.file.read(amount)
        if not text:
            self.ended = True
            return False
        self.line, self.column = self.place(self.position)
        self.window, self.position = self.window[self.position :] + text, 0
        return True

    def place(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a position in the window."""
        lines = self.window.count("\n", 0, position)
        if not lines:
            return self.line, self.column + position
        return self.line + lines, position - self.window.rindex("\n", 0, position)

    def problem(self, what: str, position: int) -> InputError:
        line, column = self.place(position)
        return InputError(f"{self.path}: line {line}, column {column}: {what}; correct the JSON there")
