"""Entries of JSON and JSON-lines files, one at a time, in bounded memory.

A file of conversations or annotations may have gigabytes; only the entry at hand is held, and a mistake is
reported with its line and column. `.zip` files with one file in them are read as that file.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from megamm.errors import InputError
from megamm.whole_files import open_without_waiting

CHUNK = 1 << 20  # characters read at once
MAX_ENTRY = 1 << 26  # characters of one entry
BLOCK_ENTRIES = 256
BLOCK_CHARACTERS = 1 << 23  # a block ends behind the entry that reaches this
_WHITE = " \t\n\r"
# The decoder may be cut in the middle of a word or number; a mistake this far from the end is one.
_MARGIN = 64


class Block(NamedTuple):
    """Some entries as text, for another process to decode.

    Attributes:
        first: number of the first entry in its file, from 0.
        line: of the first text in its file, from 1; 0 where the texts are known to be right.
        texts: the JSON of one entry each; empty ones are blank lines and no entries.
    """

    first: int
    line: int
    texts: list[str]


def iter_entries(path: Path, key: str | None = None) -> Iterator[Any]:
    """The elements of the JSON list in `path`, or its lines if it is no list; with `key`, the elements
    of the list below that key of the JSON object in `path`.

    Raises:
        InputError: unreadable, no UTF-8, or wrong JSON, with line and column; no such list.
    """
    with _opened(path) as reader:
        yield from reader.entries() if key is None else reader.listed(key)


def iter_items(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of the JSON object in `path`; raises InputError as `iter_entries` does."""
    with _opened(path) as reader:
        yield from reader.only_items()


def find_key(path: Path, keys: Collection[str]) -> str | None:
    """The first key of the JSON object in `path` that is one of `keys`; None if there is none, or no object.

    Raises:
        InputError: unreadable, or wrong JSON before that key.
    """
    with _opened(path) as reader:
        found = reader.keys() if reader.peek() == "{" else iter(())
        return next((key for key in found if key in keys), None)


def entry_blocks(path: Path, key: str | None = None) -> Iterator[Block]:
    """The entries that `iter_entries` gives, as text. JSON lines are cut but not decoded, which is some
    twenty times as fast."""
    with _opened(path) as reader:
        lines = key is None and reader.peek() not in ("[", "") and _first_line_is_an_entry(path)
    if lines:
        yield from _line_blocks(path)
        return
    with _opened(path) as reader:
        values = reader.entries() if key is None else reader.listed(key)
        yield from _blocks(reader.taken for _ in values)


def item_blocks(path: Path) -> Iterator[Block]:
    """The items of the JSON object in `path` as text, each a list of key and value."""
    with _opened(path) as reader:
        yield from _blocks(f"[{json.dumps(key)}, {reader.taken}]" for key, _ in reader.only_items())


def decode_block(path: Path, block: Block) -> Iterator[tuple[int, Any]]:
    """The number of each entry in its file, from 0, and the entry.

    Raises:
        InputError: wrong JSON, with line and column.
    """
    number = block.first
    for line, text in enumerate(block.texts, start=block.line):
        if text and not text.isspace():
            yield number, _decode(path, text, line)
            number += 1


def _decode(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: line {line}, column {error.colno}: {error.msg}; correct the JSON there"
        ) from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: line {line}: cannot be held ({error}); correct the JSON there") from None


def _blocks(texts: Iterator[str]) -> Iterator[Block]:
    first, held, size = 0, [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if len(held) == BLOCK_ENTRIES or size >= BLOCK_CHARACTERS:
            yield Block(first, 0, held)
            first, held, size = first + len(held), [], 0
    if held:
        yield Block(first, 0, held)


def _first_line_is_an_entry(path: Path) -> bool:
    with open_text(path) as file:
        line = " "
        while line.isspace():
            line = file.readline(MAX_ENTRY)
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _line_blocks(path: Path) -> Iterator[Block]:
    with open_text(path) as file:
        held: list[str] = []
        first, line, entries, size = 0, 1, 0, 0
        while text := file.readline(MAX_ENTRY + 1):
            if len(text) > MAX_ENTRY:
                raise InputError(
                    f"{path}: line {line + len(held)}, column 1: the entry has no end; correct the JSON there"
                )
            held.append(text)
            entries += not text.isspace()
            size += len(text)
            if len(held) == BLOCK_ENTRIES or size >= BLOCK_CHARACTERS:
                yield Block(first, line, held)
                first, line, held, entries, size = first + entries, line + len(held), [], 0, 0
        if entries:
            yield Block(first, line, held)


@contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """The text of a file, or of the one file in a `.zip`.

    Raises:
        InputError: also while the text is read: unreadable, no UTF-8, damaged.
    """
    remedy = "give a JSON or JSON-lines file"
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) != 1:
                    raise InputError(f"{path}: holds {len(members)} files; give a .zip that holds one")
                with archive.open(members[0]) as data:
                    yield io.TextIOWrapper(data, encoding="utf-8-sig")
        else:
            with open(path, encoding="utf-8-sig", opener=open_without_waiting) as file:
                yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; {remedy}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        if isinstance(error, RecursionError):
            raise
        raise InputError(f"{path}: the .zip cannot be read ({error}); copy it again or unpack it") from None


@contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    with open_text(path) as file:
        yield _Reader(path, file)


class _Reader:
    """A window on the text; `position` is where the next thing begins in it."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file = path, file
        self.window, self.position, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the start of the window
        self.start = 0  # of the last value
        self.decoder = json.JSONDecoder()

    @property
    def taken(self) -> str:
        """The text of the last value."""
        return self.window[self.start : self.position]

    def entries(self) -> Iterator[Any]:
        if self.peek() == "[":
            yield from self.elements()
            self.expect_end("list")
        else:
            while self.peek():
                yield self.value()

    def listed(self, wanted: str) -> Iterator[Any]:
        """The elements of the list below the key `wanted`; what follows the list is not looked at."""
        if self.peek() != "{":
            raise InputError(f'{self.path}: is no JSON object; give one with a list "{wanted}"')
        for key in self.keys():
            if key == wanted:
                if self.peek() != "[":
                    raise self.problem(f'"{wanted}" is no list', self.position)
                yield from self.elements()
                return
        raise InputError(f'{self.path}: has no "{wanted}"; give the file that holds them')

    def only_items(self) -> Iterator[tuple[str, Any]]:
        if self.peek() != "{":
            raise InputError(f"{self.path}: is no JSON object; give one with an entry below each key")
        for key in self.keys(skip=False):
            self.peek()
            yield key, self.value()
        self.expect_end("object")

    def elements(self) -> Iterator[Any]:
        for _ in self.members("]"):
            yield self.value()

    def keys(self, skip: bool = True) -> Iterator[str]:
        """The keys of an object. Whoever takes one may take the value too; else it is passed over, part by
        part, if `skip` says so."""
        for _ in self.members("}"):
            key = self.value()
            if not isinstance(key, str):
                raise self.problem("expected a key in double quotes", self.start)
            if self.peek() != ":":
                raise self.problem("expected ':'", self.position)
            self.position += 1
            yield key
            if skip:
                self.skip()

    def members(self, end: str) -> Iterator[None]:
        """From the opening bracket on: gives the turn to the caller before each member."""
        self.position += 1
        if self.peek() == end:
            self.position += 1
            return
        yield
        while (mark := self.peek()) == ",":
            self.position += 1
            self.peek()
            yield
        if mark != end:
            raise self.problem(f"expected ',' or '{end}'", self.position)
        self.position += 1

    def skip(self) -> None:
        """Pass over a value; of a list or an object only one member is held at a time."""
        first = self.peek()
        if first == "[":
            for _ in self.elements():
                pass
        elif first == "{":
            for _ in self.keys(skip=False):
                self.peek()
                self.value()
        else:
            self.value()

    def expect_end(self, what: str) -> None:
        if self.peek():
            raise self.problem(f"text after the end of the {what}", self.position)

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
                    self.start, self.position = self.position, end
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
