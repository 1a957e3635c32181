"""GQA: {question id: {"imageId", "question", "answer", "fullAnswer", ...}}, in one file or several."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import keyed
from megamm.data.formats.records import RecordFormat, answered
from megamm.data.json_entries import Block, item_blocks


class Gqa(RecordFormat):
    """The short answer is learnt. Images are "<imageId>.jpg", also in "images/"."""

    def blocks(self, path: Path) -> Iterator[Block]:
        return item_blocks(path)

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        key, entry = keyed(value, where)
        image = entry.identifier("imageId")
        names = (f"{image}.jpg", f"images/{image}.jpg")
        return answered(key, position, names, entry.text("question"), entry.text_or_none("answer"))
