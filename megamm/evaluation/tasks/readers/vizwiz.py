"""VizWiz-VQA: a list of {"image", "question", "answers": [{"answer"} x 10], "answer_type", "answerable"}; in
the test split without answers. The name of the picture is the id of the question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.formats.fields import Fields
from megamm.evaluation.tasks.files import answers_of, entries, named_or_found, roots
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

_FILES = ("val.json", "test.json")
_BELOW = ("val", "test", "train", "images")


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions in their order."""
    folders = Folders(roots(data, images), _BELOW)
    for path in named_or_found(data, _FILES):
        for entry in entries(path):
            yield _item(entry, folders)


def _item(entry: Fields, folders: Folders) -> Item:
    name = entry.name("image")
    reference: dict[str, Any] | None = None
    if "answers" in entry.entry:
        reference = {"answers": answers_of(entry)}
        if entry.entry.get("answer_type") is not None:
            reference["answer_type"] = entry.text("answer_type")
    return Item(
        id=name,
        kind="vizwiz",
        question=entry.text("question"),
        images=(folders.picture(name),),
        answer=reference["answers"][0] if reference else "",
        reference=reference,
        submission={"image": name},
    )
