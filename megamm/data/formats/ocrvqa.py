"""OCR-VQA: {id: {"imageURL", "questions": [...], "answers": [...], "split" (1, 2 or 3), ...}}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.base import FormatOptions
from megamm.data.formats.fields import keyed
from megamm.data.formats.records import RecordFormat
from megamm.data.json_entries import Block, item_blocks
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError

SPLITS = {"train": 1, "val": 2, "test": 3}


class OcrVqa(RecordFormat):
    """One conversation for every book cover, of all its questions; of the option `split` alone.

    Images are the id with the ending of "imageURL", or ".jpg", also in "images/".
    """

    uses = ("split",)

    def __init__(self, options: FormatOptions = FormatOptions()) -> None:  # noqa: B008 (frozen)
        super().__init__(options)
        if options.split not in SPLITS:
            raise InputError(f"split: OCR-VQA has no {options.split!r}; choose one of {', '.join(SPLITS)}")

    def blocks(self, path: Path) -> Iterator[Block]:
        return item_blocks(path)

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped | None:
        key, entry = keyed(value, where)
        if entry.number("split") != SPLITS[self.options.split]:
            return None
        questions, answers = entry.texts("questions"), entry.texts("answers")
        if len(questions) != len(answers):
            raise entry.problem("answers", f"a list of {len(questions)} texts, as the questions are")
        turns: list[Turn] = []
        for question, answer in zip(questions, answers, strict=True):
            if question and answer:
                place = "" if turns else f"{IMAGE_TOKEN}\n"
                turns += [Turn("user", place + question), Turn("assistant", answer)]
        if not turns:
            return Skipped(key, position, "has no question with an answer")
        ending = PurePosixPath(entry.text_or_none("imageURL").partition("?")[0]).suffix or ".jpg"
        files = dict.fromkeys((f"{key}{ending}", f"{key}.jpg"))
        names = tuple(name for file in files for name in (file, f"images/{file}"))
        return Conversation(key, position, [names], turns, "vqa")
