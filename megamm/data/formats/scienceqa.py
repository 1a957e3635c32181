"""ScienceQA's problems.json: {id: {"question", "choices", "answer" (number of the right choice), "hint",
"image" (a file name or null), "split", ...}}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm.data.conversation import Conversation, ImageRef, Skipped
from megamm.data.formats.fields import keyed
from megamm.data.formats.records import MAX_CHOICES, RecordFormat, answered, letter, lettered
from megamm.data.json_entries import Block, item_blocks
from megamm.errors import InputError


class ScienceQa(RecordFormat):
    """Question, hint as context, choices behind their letters; the letter is learnt. Of the option `split`
    alone, also those without an image.

    Images are "<split>/<id>/<image>", also within "images/" and without the split.
    """

    uses = ("split",)

    def blocks(self, path: Path) -> Iterator[Block]:
        return item_blocks(path)

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped | None:
        if isinstance(value[1], list):
            raise InputError(
                f"{where}: is a list, as in pid_splits.json; give problems.json alone, it names the splits"
            )
        key, entry = keyed(value, where)
        split = entry.text("split")
        if split != self.options.split:
            return None
        choices, right = entry.texts("choices"), entry.number("answer")
        if not right < len(choices) <= MAX_CHOICES:
            raise entry.problem("answer", f"the number of one of {len(choices)} choices")
        question, hint = entry.text("question"), entry.text_or_none("hint")
        if hint:
            question += f"\nContext: {hint}"
        image: ImageRef | None = None
        if entry.entry.get("image") is not None:
            name = entry.name("image")
            image = (f"{split}/{key}/{name}", f"images/{split}/{key}/{name}", f"{key}/{name}")
        return answered(key, position, image, lettered(question, choices), letter(right), "choice")
