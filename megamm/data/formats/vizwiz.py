"""VizWiz-VQA: a list of {"image", "question", "answers": [{"answer", ...} x 10], "answerable", ...}.

Its captions (VizWiz-Captions) have the layout of COCO: `megamm.data.formats.coco`.
"""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import Fields, most_frequent
from megamm.data.formats.records import RecordFormat, answered


class VizWiz(RecordFormat):
    """The most frequent answer is learnt, "unanswerable" as any other. Images are "image", also in the
    folder of their split ("train/VizWiz_train_00000000.jpg")."""

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        name = entry.name("image")
        parts = name.split("_")
        names = (name, f"{parts[1]}/{name}") if len(parts) > 2 else name
        if "answers" not in entry.entry:
            return Skipped(name, position, "has no answer")
        given = [Fields(each, where).text_or_none("answer") for each in entry.listed("answers")]
        question = entry.text("question")
        return answered(name, position, names, question, most_frequent(given), "vizwiz")
