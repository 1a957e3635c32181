"""TextVQA 0.5.1: {"data": [{"question_id", "question", "image_id", "answers" (10)}]}, and the words that
Rosetta read in its pictures: {"data": [{"image_id", "ocr_tokens", ...}]}."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from megamm.data.formats.fields import Fields
from megamm.errors import InputError
from megamm.evaluation.tasks.files import answers_of, entries, find_file, need_file, roots, there
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

_QUESTIONS = ("TextVQA_0.5.1_val.json", "TextVQA_0.5.1_test.json", "TextVQA_*_val.json")
_BELOW = ("train_images", "test_images", "images", "train_val_images/train_images")


def read(data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
    """The questions; with the words in their pictures where a file of those is given, lies in the same folder
    or stands in the entries."""
    questions, words = _files(data)
    ocr = {}
    for path in words:
        for entry in entries(path, "data"):
            ocr[entry.identifier("image_id")] = tuple(entry.texts("ocr_tokens"))
    folders = Folders(roots(data, images), _BELOW)
    for path in questions:
        for entry in entries(path, "data"):
            yield _item(entry, ocr, folders)


def _files(data: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    questions, words = [], []
    for path in data:
        if path.is_dir():
            questions.append(need_file(path, _QUESTIONS))
            part = questions[-1].stem.rpartition("_")[2]
            if found := find_file(path, [f"TextVQA_Rosetta_OCR_*_{part}.json"]):
                words.append(found)
            continue
        first = next(islice(entries(there(path), "data"), 1), None)
        holds_words = first is not None and "ocr_tokens" in first.entry and "question" not in first.entry
        (words if holds_words else questions).append(path)
    if not questions:
        raise InputError(f"{data[0]}: holds words in pictures alone; give the file with the questions too")
    return questions, words


def _item(entry: Fields, ocr: dict[str, tuple[str, ...]], folders: Folders) -> Item:
    image = entry.identifier("image_id")
    found = tuple(entry.texts("ocr_tokens")) if "ocr_tokens" in entry.entry else ocr.get(image)
    answers = answers_of(entry) if "answers" in entry.entry else []
    return Item(
        id=entry.identifier("question_id"),
        kind="textvqa",
        question=entry.text("question"),
        images=(folders.picture(f"{image}.jpg"),),
        ocr=found,
        answer=answers[0] if answers else "",
        reference={"answers": answers} if answers else None,
        submission={"question_id": entry.entry["question_id"]},
    )
