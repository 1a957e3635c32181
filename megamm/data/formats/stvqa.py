"""ST-VQA: {"data": [{"question_id", "question", "file_path", "answers", ...}]}."""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import Fields, most_frequent
from megamm.data.formats.records import RecordFormat, answered


class StVqa(RecordFormat):
    """The most frequent answer is learnt, the first on a tie. Images are "file_path"."""

    key = "data"

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key = entry.identifier("question_id") if "question_id" in entry.entry else str(position)
        image, question = entry.name("file_path"), entry.text("question")
        if "answers" not in entry.entry:
            return Skipped(key, position, "has no answer")
        return answered(key, position, image, question, most_frequent(entry.texts("answers")))
