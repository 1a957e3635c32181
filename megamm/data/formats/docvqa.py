"""DocVQA: {"data": [{"questionId", "question", "image" ("documents/..."), "answers", ...}]}."""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import Fields, most_frequent
from megamm.data.formats.records import RecordFormat, answered


class DocVqa(RecordFormat):
    """The most frequent answer is learnt, the first on a tie. Images are "image", also without its folder."""

    key = "data"

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key, image, question = entry.identifier("questionId"), entry.name("image"), entry.text("question")
        if "answers" not in entry.entry:
            return Skipped(key, position, "has no answer")
        base = image.rpartition("/")[2]
        names = (image, base) if base not in ("", image) else image
        return answered(key, position, names, question, most_frequent(entry.texts("answers")))
