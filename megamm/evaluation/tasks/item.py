"""What every benchmark is read into: questions with their pictures, and what is known of their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megamm.evaluation.tasks.pictures import Source


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: of the row in predictions and references; no two items of a task share it.
        kind: of question; a set of prompts has words for each ("caption", "vqa", "choice", ...).
        question: as the data set words it, with `<image>` only where a picture has its place in the words.
        images: in the order of their placeholders, or before the question where it has none.
        choices: in the order of their letters.
        hint: context that belongs to a question with choices.
        ocr: words that a reader of text found in the picture; None where nobody looked.
        answer: what a demonstration answers; "" where the data have no answer.
        reference: the row of the references without its id; None where the data have no answer.
        submission: what the format of the official server names the question by.
    """

    id: str
    kind: str
    question: str = ""
    images: tuple[Source, ...] = ()
    choices: tuple[str, ...] = ()
    hint: str = ""
    ocr: tuple[str, ...] | None = None
    answer: str = ""
    reference: Mapping[str, Any] | None = None
    submission: Mapping[str, Any] = field(default_factory=dict)
