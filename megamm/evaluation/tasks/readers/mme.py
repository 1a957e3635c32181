"""MME: a folder for each of its 14 tasks, with two yes/no questions about each picture.

Two layouts of the release, which it mixes: <task>/images/<name>.jpg with
<task>/questions_answers_YN/<name>.txt, and <task>/<name>.jpg with <task>/<name>.txt; lines
"question<TAB>answer". Or, as in its evaluation tool, <task>.txt with lines "picture<TAB>question<TAB>answer".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.data.formats.fields import plain
from megamm.data.image_places import SUFFIXES
from megamm.data.json_entries import open_text
from megamm.errors import InputError
from megamm.evaluation.tasks.files import roots, there
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

TASKS = (
    *(
        "existence",
        "count",
        "position",
        "color",
        "posters",
        "celebrity",
        "scene",
        "landmark",
        "artwork",
        "OCR",
    ),
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
_ANSWERS = "questions_answers_YN"


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions of all tasks that are there, task by task, in the order of the pictures' names."""
    for folder in data:
        if not there(folder).is_dir():
            raise InputError(
                f"{folder}: is no folder; give the one that holds MME's tasks ({', '.join(TASKS[:3])}, ...)"
            )
        found = [task for task in TASKS if (folder / task).is_dir() or (folder / f"{task}.txt").is_file()]
        if not found:
            raise InputError(
                f"{folder}: holds none of MME's tasks ({', '.join(TASKS[:3])}, ...); give the "
                "folder that does"
            )
        folders = Folders(roots([folder], images))
        for task in found:
            listed = folder / f"{task}.txt"
            yield from (
                _of_list(listed, task, folders) if listed.is_file() else _of_folder(folder / task, folders)
            )


def _of_folder(folder: Path, folders: Folders) -> Iterator[Item]:
    inside = folder / _ANSWERS
    texts = sorted((inside if inside.is_dir() else folder).glob("*.txt"))
    if not texts:
        raise InputError(f"{folder}: holds no .txt with questions; copy the task again from the release")
    for path in texts:
        places = [f"{folder.name}/images/{path.stem}", f"{folder.name}/{path.stem}"]
        names = [place + suffix for place in places for suffix in sorted(SUFFIXES)]
        for number, (question, answer) in enumerate(_lines(path, 2), start=1):
            yield _item(
                folder.name, path.stem, names, number, question, answer, f"{path}: line {number}", folders
            )


def _of_list(path: Path, task: str, folders: Folders) -> Iterator[Item]:
    asked: dict[str, int] = {}
    for number, (image, question, answer) in enumerate(_lines(path, 3), start=1):
        asked[image] = asked.get(image, 0) + 1
        names = [f"{task}/{image}", f"{task}/images/{image}"]
        yield _item(task, image, names, asked[image], question, answer, f"{path}: line {number}", folders)


def _lines(path: Path, columns: int) -> Iterator[list[str]]:
    """The columns of each line; a further column, an answer of some model, is left out."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            found = [part.strip() for part in line.rstrip("\r\n").split("\t")]
            if len(found) not in (columns, columns + 1) or not all(found[:columns]):
                raise InputError(
                    f"{path}: line {number}: has not {columns} columns between tabs; copy the "
                    "file again from "
                    "the release"
                )
            yield found[:columns]


def _item(
    task: str,
    image: str,
    names: list[str],
    number: int,
    question: str,
    answer: str,
    where: str,
    folders: Folders,
) -> Item:
    label = answer.lower()
    if label not in ("yes", "no"):
        raise InputError(f"{where}: the answer is {answer[:40]!r}; it must be Yes or No")
    return Item(
        id=f"{task}/{image}/{number}",
        kind="mme",
        question=plain(question),
        images=(folders.picture(*names),),
        answer=answer,
        reference={"label": label, "task": task, "image": image},
        submission={"task": task, "image": image, "question": question, "answer": answer},
    )
