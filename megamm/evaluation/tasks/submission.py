"""The files that the official servers (of MME, its evaluation tool) take."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megamm.errors import InputError, RunError
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.registry import Task
from megamm.whole_files import written_whole

Answers = Sequence[tuple[Item, str]]
_LETTER = re.compile(r"\(?([A-Z])(?:[).:,]|\s|$)")


def write_submission(task: Task, path: Path, answers: Answers) -> None:
    """Write the answers in the format of the benchmark's server.

    Args:
        path: the file; for MME the folder of its tasks' files.
        answers: items and predictions, in the order of the questions.
    Raises:
        RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if task.submission in _TABLES:
            _TABLES[task.submission](path, answers)
            return
        with written_whole(path) as file:
            json.dump(_JSON[task.submission](answers), file, ensure_ascii=False)
            file.write("\n")
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}); free space or fix the permissions"
        ) from None


def check_submission(task: Task, path: Path) -> None:
    """Raise InputError if no server takes answers to the benchmark, or `path` is no place for them."""
    if not task.submission:
        raise InputError(
            f"--submission: no server takes answers to {task.name}; its score is what `megamm "
            "evaluate` prints"
        )
    if path.is_dir() and task.submission != "mme":
        raise InputError(f"{path}: is a folder; give a file with --submission")
    if task.submission == "mme" and path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; give a folder with --submission, MME has a file for each task")


def _captions(answers: Answers) -> Any:
    return [_named(item, "caption", text) for item, text in answers]


def _answers(answers: Answers) -> Any:
    return [_named(item, "answer", text) for item, text in answers]


def _gqa(answers: Answers) -> Any:
    """As LLaVA converts its answers: without a full stop at the end, in lower case."""
    return [_named(item, "prediction", text.strip().rstrip(".").lower()) for item, text in answers]


def _mmmu(answers: Answers) -> Any:
    """Letters for questions with options where the answer names one; otherwise the answer itself."""
    found = {}
    for item, text in answers:
        letter = _LETTER.match(text.strip()) if item.kind == "mmmu" else None
        is_option = letter is not None and ord(letter[1]) - ord("A") < len(item.choices)
        found[item.submission["id"]] = letter[1] if letter is not None and is_option else text.strip()
    return found


def _named(item: Item, key: str, value: str) -> dict[str, Any]:
    return {**item.submission, key: value.strip()}


def _mmbench(path: Path, answers: Answers) -> None:
    """A table of the columns that LLaVA's conversion keeps, with "prediction" behind the options."""
    with written_whole(path) as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        columns = list(answers[0][0].submission)
        place = columns.index("D") + 1 if "D" in columns else len(columns)
        table.writerow([*columns[:place], "prediction", *columns[place:]])
        for item, text in answers:
            cells = list(item.submission.values())
            table.writerow([*cells[:place], text.strip(), *cells[place:]])


def _mme(folder: Path, answers: Answers) -> None:
    """A file for each task, of lines "picture, question, answer, prediction" between tabs."""
    folder.mkdir(exist_ok=True)
    tasks: dict[str, list[list[str]]] = {}
    for item, text in answers:
        names = item.submission
        cells = [names["image"], names["question"], names["answer"], " ".join(text.split())]
        tasks.setdefault(names["task"], []).append(cells)
    for task, rows in tasks.items():
        with written_whole(folder / f"{task}.txt") as file:
            file.writelines("\t".join(row) + "\n" for row in rows)


_JSON: dict[str, Callable[[Answers], Any]] = {
    "captions": _captions,
    "answers": _answers,
    "gqa": _gqa,
    "mmmu": _mmmu,
}
_TABLES: dict[str, Callable[[Path, Answers], None]] = {"mmbench": _mmbench, "mme": _mme}
