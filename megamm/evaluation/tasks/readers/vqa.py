"""VQAv2 and OK-VQA: {"questions": [{"question_id", "image_id", "question"}]} and, but for test splits,
{"annotations": [{"question_id", "answers": [{"answer"} x 10], "answer_type", ...}]}."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.formats.fields import Fields
from megamm.data.formats.lookup import joined_chunks, lookup
from megamm.data.formats.records import coco_names
from megamm.data.json_entries import find_key
from megamm.errors import InputError
from megamm.evaluation.tasks.files import answers_of, entries, fields, find_file, need_file, roots, there
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

_QUESTIONS = (
    *("*OpenEnded*val2014_questions.json", "*OpenEnded*test-dev2015_questions.json"),
    *("*OpenEnded*test2015_questions.json", "*questions*.json"),
)
_ANNOTATIONS = {"val2014": "*mscoco_val2014_annotations.json", "": "*annotations*.json"}
_BELOW = ("images", "val2014", "test2015", "train2014", "coco")


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions, joined to their annotations by "question_id". A demonstration answers with the first of
    the ten answers, as OpenFlamingo's do."""
    questions, annotations = _files(data)
    folders = Folders(roots(data, images), _BELOW)
    with lookup() as known:
        for path in annotations:
            known.put(_answers(path))
        matched = not annotations
        for number, path in enumerate(questions):
            for chunk in joined_chunks(path, number, "questions", "question_id", known):
                first, pairs = chunk.payload
                for position, (question, found) in enumerate(pairs, start=first + 1):
                    matched = matched or found is not None
                    yield _item(fields(question, f"{path}: entry {position}"), found, folders)
    if not matched:
        raise InputError(
            f"{annotations[0]}: has annotations for none of the questions in {questions[0]}; give "
            "those of the "
            "same split"
        )


def _files(data: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files of questions and those of annotations, told apart by what they hold."""
    questions, annotations = [], []
    for path in data:
        if path.is_dir():
            questions.append(need_file(path, _QUESTIONS))
            pattern = next(p for name, p in _ANNOTATIONS.items() if name in questions[-1].name)
            if "test" not in questions[-1].name and (found := find_file(path, [pattern])):
                annotations.append(found)
            continue
        kind = find_key(there(path), ("questions", "annotations"))
        if kind is None:
            raise InputError(
                f'{path}: has neither "questions" nor "annotations"; give files of VQAv2 or OK-VQA'
            )
        (questions if kind == "questions" else annotations).append(path)
    if not questions:
        raise InputError(f"{data[0]}: holds annotations alone; give the file with the questions too")
    return questions, annotations


def _answers(path: Path) -> Iterator[tuple[str, str]]:
    for entry in entries(path, "annotations"):
        kept: dict[str, Any] = {"answers": answers_of(entry)}
        for key in ("answer_type", "question_type"):
            if entry.entry.get(key) is not None:
                kept[key] = entry.text(key)
        yield entry.identifier("question_id"), json.dumps(kept)


def _item(entry: Fields, annotation: str | None, folders: Folders) -> Item:
    key, image_id = entry.identifier("question_id"), entry.number("image_id")
    reference = None if annotation is None else json.loads(annotation)
    test = f"COCO_test2015_{image_id:012d}.jpg"
    names = coco_names(image_id)
    assert isinstance(names, tuple)
    return Item(
        id=key,
        kind="vqa",
        question=entry.text("question"),
        images=(folders.picture(*names, test),),
        answer=reference["answers"][0] if reference else "",
        reference=reference,
        submission={"question_id": entry.entry["question_id"]},
    )
