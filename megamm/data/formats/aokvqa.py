"""A-OKVQA: a list of {"question_id", "image_id", "question", "choices" (4), "correct_choice_idx",
"direct_answers" (10), ...}."""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import Fields, most_frequent
from megamm.data.formats.records import MAX_CHOICES, RecordFormat, answered, coco_names, letter, lettered


class AOkvqa(RecordFormat):
    """As multiple choice: the choices behind their letters, and the letter of the right one. Images are
    those of COCO."""

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key, image = entry.identifier("question_id"), coco_names(entry.number("image_id"))
        question = entry.text("question")
        if "correct_choice_idx" not in entry.entry:
            return Skipped(key, position, "has no answer")
        choices, right = entry.texts("choices"), entry.number("correct_choice_idx")
        if not right < len(choices) <= MAX_CHOICES:
            raise entry.problem("correct_choice_idx", f"the number of one of {len(choices)} choices")
        return answered(key, position, image, lettered(question, choices), letter(right), "choice")


class AOkvqaDirect(RecordFormat):
    """As open questions: the most frequent of "direct_answers"."""

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key, image = entry.identifier("question_id"), coco_names(entry.number("image_id"))
        question = entry.text("question")
        if "direct_answers" not in entry.entry:
            return Skipped(key, position, "has no answer")
        return answered(key, position, image, question, most_frequent(entry.texts("direct_answers")))
