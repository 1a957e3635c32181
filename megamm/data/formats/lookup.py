"""Joining the entries of one file to what another says of them, on disk: both may be too long for memory."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megamm.data.formats.base import CHUNK_ENTRIES, Chunk
from megamm.data.formats.fields import Fields
from megamm.data.json_entries import iter_entries
from megamm.errors import InputError, RunError

_AT_ONCE = 500  # keys of one query; sqlite allows at least 999


class Lookup:
    """Texts by text; of keys that come twice the first counts."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def put(self, items: Iterable[tuple[str, str]]) -> int:
        """Add (key, value) pairs; the number of those that were new."""
        before = self._connection.total_changes
        self._connection.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", items)
        return self._connection.total_changes - before

    def get(self, keys: list[str]) -> dict[str, str]:
        """The values of those keys that are there."""
        found: dict[str, str] = {}
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            found.update(
                self._connection.execute(f"SELECT key, value FROM entries WHERE key IN ({marks})", part)
            )
        return found


@contextmanager
def lookup() -> Iterator[Lookup]:
    """An empty one, in a folder for temporary files that is removed at the end.

    Raises:
        RunError: the disk is full or not writable.
    """
    with tempfile.TemporaryDirectory(prefix="megamm-") as folder:
        connection = sqlite3.connect(Path(folder) / "lookup.db", isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
            connection.execute("BEGIN")
            yield Lookup(connection)
        except sqlite3.Error as error:
            raise RunError(f"{folder}: cannot be written ({error}); set TMPDIR to a disk with room") from None
        finally:
            connection.close()


def joined_chunks(path: Path, number: int, list_key: str, id_key: str, texts: Lookup) -> Iterator[Chunk]:
    """Chunks of a list in a JSON file, each entry with the text that is kept for its id, or None.

    Raises:
        InputError: the list is missing or empty, an entry has no id.
    """
    held: list[object] = []
    first = 0

    def chunk() -> Chunk:
        keys = [
            Fields(value, f"{path}: entry {position + 1}").identifier(id_key)
            for position, value in enumerate(held, start=first)
        ]
        found = texts.get(keys)
        pairs = [(value, found.get(key)) for value, key in zip(held, keys, strict=True)]
        return Chunk(str(path), number, (first, pairs))

    for value in iter_entries(path, list_key):
        held.append(value)
        if len(held) == CHUNK_ENTRIES:
            yield chunk()
            first, held = first + len(held), []
    if held:
        yield chunk()
    elif not first:
        raise InputError(f'{path}: its "{list_key}" are empty; give a file that holds some')
