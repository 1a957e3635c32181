"""GQA: "
"{question id: {"imageId", "question", "answer", "types": {"structural", "semantic", "detailed"}, ...}}."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.formats.fields import Fields
from megamm.data.json_entries import iter_items
from megamm.evaluation.tasks.files import fields, named_or_found, roots
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

_FILES = ("testdev_balanced_questions.json", "val_balanced_questions.json", "test_balanced_questions.json")
_BELOW = ("images", "allImages/images")


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions in the order of the file."""
    folders = Folders(roots(data, images), _BELOW)
    for path in named_or_found(data, _FILES):
        for key, value in iter_items(path):
            yield _item(key, fields(value, f"{path}: question {ascii(key)[:40]}"), folders)


def _item(key: str, entry: Fields, folders: Folders) -> Item:
    answer = entry.text_or_none("answer")
    reference: dict[str, Any] | None = {"label": answer} if answer else None
    types = entry.entry.get("types")
    if reference is not None and types is not None:
        known = fields(types, f'{entry.where}: "types"')
        reference["types"] = {name: known.text(name) for name in types if types[name] is not None}
    return Item(
        id=key,
        kind="vqa",
        question=entry.text("question"),
        images=(folders.picture(f"{entry.identifier('imageId')}.jpg"),),
        answer=answer,
        reference=reference,
        submission={"questionId": key},
    )
