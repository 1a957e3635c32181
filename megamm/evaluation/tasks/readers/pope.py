"""POPE: coco_pope_random.json, ..._popular.json and ..._adversarial.json, lines of "
"{"question_id", "image", "text",
"label"}. Each numbers its questions from 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.data.formats.fields import Fields
from megamm.errors import InputError
from megamm.evaluation.tasks.files import entries, need_file, roots, there
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

SPLITS = ("random", "popular", "adversarial")
_BELOW = ("val2014", "images", "coco/val2014")


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions of the three splits of a folder, or of the files that are given; a file's split is in its
    name."""
    folders = Folders(roots(data, images), _BELOW)
    for path, name in _files(data):
        for entry in entries(path, word="line"):
            yield _item(entry, name, folders)


def _files(data: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    for path in data:
        if path.is_dir():
            yield from ((need_file(path, [f"*pope_{name}.json*"]), name) for name in SPLITS)
            continue
        name = next((name for name in SPLITS if name in there(path).stem), None)
        if name is None:
            raise InputError(
                f"{path}: its name tells none of the splits {', '.join(SPLITS)}; rename it so that it does"
            )
        yield path, name


def _item(entry: Fields, split: str, folders: Folders) -> Item:
    label = entry.text("label").lower()
    if label not in ("yes", "no"):
        raise entry.problem("label", '"yes" or "no"')
    return Item(
        id=f"{split}/{entry.identifier('question_id')}",
        kind="vqa",
        question=entry.text("text"),
        images=(folders.picture(entry.name("image")),),
        answer=label,
        reference={"label": label, "split": split},
    )
