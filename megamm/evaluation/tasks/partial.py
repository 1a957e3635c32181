"""Answers as they come: PRED.jsonl.partial, a line for each question behind a first line that says of which
evaluation. A killed one goes on behind the last whole line; each copy of the model has a file of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megamm.errors import InputError, RunError

Row = dict[str, Any]
Fingerprint = Mapping[str, Any]
_SUFFIX = ".partial"


def partial_path(out: Path, copy: int, num_copies: int) -> Path:
    """The file of one copy of the model; `out` is that of the predictions."""
    return out.with_name(f"{out.name}{_SUFFIX}" + (f".{copy}" if num_copies > 1 else ""))


def partial_files(out: Path) -> list[Path]:
    """All such files that are there, whatever the number of copies was that wrote them."""
    start = out.name + _SUFFIX
    try:
        names = sorted(os.listdir(out.parent))
    except FileNotFoundError:
        return []
    wanted = [name for name in names if name.startswith(start)]
    return [out.parent / name for name in wanted if _is_number(name.removeprefix(start))]


def _is_number(ending: str) -> bool:
    return ending == "" or (ending[0] == "." and ending[1:].isdecimal())


def read_partials(out: Path, fingerprint: Fingerprint, num_items: int) -> dict[int, Row]:
    """The answers that are there, by the number of the question.

    Raises:
        InputError: a file is of another evaluation, or damaged.
    """
    found: dict[int, Row] = {}
    for path in partial_files(out):
        for number, line in enumerate(_whole_lines(path), start=1):
            value = _decoded(path, number, line)
            if number == 1:
                _check(path, value, fingerprint)
                continue
            index, row = value.get("question"), value.get("row")
            if not isinstance(index, int) or not 0 <= index < num_items or not isinstance(row, dict):
                raise _damaged(path, number)
            found[index] = row
    return found


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines that were written to their end."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line.decode("utf-8", "replace")


def _decoded(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(path, number)
    return value


def _damaged(path: Path, number: int) -> InputError:
    return InputError(f"{path}: line {number}: is damaged; delete the file to begin anew")


def _check(path: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    """Raise InputError, naming what differs, unless a file is of this evaluation."""
    ours, theirs = dict(_leaves(wanted)), dict(_leaves(found))
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"{path}: was begun with another {key} ({_short(theirs.get(key))}, now "
                f"{_short(ours.get(key))}); "
                "delete it to begin anew, or give another --out"
            )


def _leaves(tree: Fingerprint, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    return str(value)[:12]


class AnswerFile:
    """Appends answers; what was written of a line that has no end is cut off first.

    Args:
        path: as of `partial_path`.
        fingerprint: written as the first line where there is none.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab")  # noqa: SIM115 (closed by close)
            end = _end_of_lines(path)
            self._file.truncate(end)
            if not end:
                self._write(json.dumps(fingerprint) + "\n")
        except OSError as error:
            raise self._failed(error) from None

    def append(self, rows: Iterable[tuple[int, Row]]) -> None:
        """Write the answers of a batch, each with the number of its question.

        Raises:
            RunError: they cannot be written.
        """
        lines = [json.dumps({"question": index, "row": row}, ensure_ascii=False) for index, row in rows]
        try:
            self._write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise self._failed(error) from None

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "replace"))
        self._file.flush()

    def _failed(self, error: OSError) -> RunError:
        return RunError(
            f"{self._path}: cannot be written ({error.strerror}); free space or fix the permissions"
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_of_lines(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line) if line.endswith(b"\n") else 0
    return end
