"""TextVQA 0.5.1: {"data": [{"question_id", "question", "image_id", "answers" (10), ...}]}."""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import Fields, most_frequent
from megamm.data.formats.records import RecordFormat, answered


class TextVqa(RecordFormat):
    """The most frequent answer is learnt. Images are "<image_id>.jpg", also in "train_images/"."""

    key = "data"

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key, image = entry.identifier("question_id"), entry.identifier("image_id")
        names = (f"{image}.jpg", f"train_images/{image}.jpg")
        if "answers" not in entry.entry:
            return Skipped(key, position, "has no answer")
        answer = most_frequent(entry.texts("answers"))
        return answered(key, position, names, entry.text("question"), answer)
