"""Finding the files of a benchmark among what --data names: single files, or the folder of its release."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.formats.fields import Fields
from megamm.data.json_entries import iter_entries
from megamm.errors import InputError


def find_file(folder: Path, patterns: Sequence[str]) -> Path | None:
    """The file that the first fitting pattern finds in the folder, or one folder below it.

    Raises:
        InputError: a pattern fits several files.
    """
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        found = found or sorted(path for path in folder.glob(f"*/{pattern}") if path.is_file())
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in found[:4])
            raise InputError(f"{folder}: holds {names}; give the one that is meant with --data")
        if found:
            return found[0]
    return None


def need_file(folder: Path, patterns: Sequence[str]) -> Path:
    """As `find_file`; raises InputError, with the names that were looked for, if there is none."""
    found = find_file(folder, patterns)
    if found is None:
        raise InputError(
            f"{folder}: holds no {' nor '.join(patterns)}; give the file of the questions with --data"
        )
    return found


def named_or_found(data: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """The files among `data`, and of each folder among them the file that fits."""
    return [need_file(path, patterns) if path.is_dir() else there(path) for path in data]


def there(path: Path) -> Path:
    """The path; raises InputError if nothing is there."""
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; give the data of the benchmark with --data")
    return path


def roots(data: Sequence[Path], images: Path | None) -> list[Path]:
    """Folders in which pictures are looked for: that of --images alone, or those of the data and the ones
    above them."""
    if images is not None:
        if not images.is_dir():
            raise InputError(f"{images}: no such folder; give the folder of the pictures with --images")
        return [images]
    folders = [path if path.is_dir() else path.parent for path in data]
    above = [folder.resolve().parent for path, folder in zip(data, folders, strict=True) if path != folder]
    return list(dict.fromkeys([*folders, *above]))


def fields(value: Any, where: str) -> Fields:
    """Typed access to an entry; InputError if it is no JSON object."""
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: is no JSON object; check that the file is one of the --task that was given"
        )
    return Fields(value, where)


def entries(path: Path, key: str | None = None, word: str = "entry") -> Iterator[Fields]:
    """The entries of a JSON list, of JSON lines, or of the list below `key`, each named by its number.

    Raises:
        InputError: as of `iter_entries`; an entry is no JSON object.
    """
    for position, value in enumerate(iter_entries(path, key), start=1):
        yield fields(value, f"{path}: {word} {position}")


def answers_of(entry: Fields, key: str = "answers") -> list[str]:
    """What people answered: texts, or objects with an "answer". A blank answer stays one."""
    found = []
    for value in entry.listed(key):
        if isinstance(value, dict):
            found.append(Fields(value, entry.where).text_or_none("answer"))
        elif isinstance(value, str):
            found.append(value.strip())
        else:
            raise entry.problem(key, 'a list of texts, or of objects with an "answer"')
    if not found:
        raise entry.problem(key, "a list that is not empty")
    return found
