"""ScienceQA: problems.json {id: {"question", "choices", "answer" (number of the right choice), "hint",
"image" (a file name or null), "split"}}, pid_splits.json {split: [ids]}, pictures "test/<id>/image.png"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.data.formats.fields import Fields
from megamm.data.formats.records import MAX_CHOICES, letter
from megamm.data.json_entries import iter_items
from megamm.errors import InputError
from megamm.evaluation.tasks.files import fields, named_or_found, roots
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

_FILES = ("problems.json",)


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions of the split that have a picture (ScienceQA-IMG), in the order of pid_splits.json where
    that lies beside the problems."""
    folders = Folders(roots(data, images), ("images",))
    for path in named_or_found([p for p in data if p.name != "pid_splits.json"] or data, _FILES):
        order = _order(path.parent / "pid_splits.json", split)
        items = dict(_items(path, split, folders, order))
        if not items:
            raise InputError(
                f'{path}: has no question with a picture in the split "{split}"; give a file that has some'
            )
        yield from (items[key] for key in order or items if key in items)


def _order(path: Path, split: str) -> list[str]:
    if not path.is_file():
        return []
    for name, value in iter_items(path):
        if name == split:
            if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
                raise InputError(f'{path}: "{split}" is no list of ids; copy the file again from the release')
            return value
    raise InputError(f'{path}: has no split "{split}"; copy the file again from the release')


def _items(path: Path, split: str, folders: Folders, order: list[str]) -> Iterator[tuple[str, Item]]:
    wanted = set(order)
    for key, value in iter_items(path):
        entry = fields(value, f"{path}: question {ascii(key)[:40]}")
        if entry.entry.get("image") is not None and (
            key in wanted if wanted else entry.text("split") == split
        ):
            yield key, _item(key, entry, split, folders)


def _item(key: str, entry: Fields, split: str, folders: Folders) -> Item:
    choices, right = entry.texts("choices"), entry.number("answer")
    if not right < len(choices) <= MAX_CHOICES:
        raise entry.problem("answer", f"the number of one of {len(choices)} choices")
    name = entry.name("image")
    return Item(
        id=key,
        kind="scienceqa",
        question=entry.text("question"),
        images=(folders.picture(f"{split}/{key}/{name}", f"{key}/{name}"),),
        choices=tuple(choices),
        hint=entry.text_or_none("hint"),
        answer=letter(right),
        reference={"label": letter(right), "options": choices, "has_image": True},
    )
