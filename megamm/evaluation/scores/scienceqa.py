"""ScienceQA (Lu et al. 2022), as LLaVA's eval_science_qa.py scores it.

A prediction is a letter alone, or begins with "X. ", or has "The answer is X." or "The answer is X" in it;
anything else is wrong, "X." without a space too. Line ends count as ". ".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from megamm.evaluation.scores.pairing import Question, group_name, label, paired
from megamm.evaluation.scores.result import Groups, Scores, accuracy_by, percent

LETTERS = "ABCDE"
_SENTENCE = "The answer is "
_PATTERNS = (re.compile(r"The answer is ([A-E])\."), re.compile(r"The answer is ([A-E])"))
_KINDS = ("subject", "grade", "topic")


def score_scienceqa(
    predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]
) -> Scores:
    """Accuracy over all questions, and over those with a picture (`image_accuracy`) where references tell.

    Args:
        references: {"id", "label": letter, or number of the choice from 0[, "choices" or "options": [text,
            ...]] [, "image": name or nothing][, "has_image": true or false]}. A letter beyond the choices is
            wrong.
    Raises:
        InputError: of `paired`; a label that is no choice. Predictions without a reference are counted only.
    """
    pairs = paired(predictions, references, strict=False)
    rights = [float(_is_right(question)) for question in pairs.questions]
    numbers: dict[str, float | None] = {"accuracy": percent(rights)}
    pictured = [_has_image(question) for question in pairs.questions]
    counts = dict(pairs.counts)
    if any(flag is not None for flag in pictured):
        values = [right for right, flag in zip(rights, pictured, strict=True) if flag]
        numbers["image_accuracy"] = percent(values) if values else None
        counts["n_image"] = len(values)
    groups: Groups = {}
    for kind in _KINDS:
        names = (group_name(question, kind) for question in pairs.questions)
        if found := accuracy_by(zip(names, rights, strict=True)):
            groups[f"by_{kind}"] = found
    return Scores("scienceqa", numbers, counts, groups)


def letter_of(prediction: str) -> str | None:
    """The letter that a prediction names; None if it is not in one of the three forms."""
    text = prediction.replace("\n", ". ")
    if len(text.strip()) == 1 and text.strip() in LETTERS:
        return text.strip()
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    if _SENTENCE in text:
        found = next(filter(None, (pattern.search(text) for pattern in _PATTERNS)), None)
        return found[1] if found else None
    return None


def _is_right(question: Question) -> bool:
    expected = _expected(question)
    return question.prediction is not None and letter_of(question.prediction) == expected


def _expected(question: Question) -> str:
    value, letters = label(question), LETTERS[: _num_choices(question)]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    if isinstance(value, str) and len(value) == 1 and value in letters:
        return value
    question.fail(f"the label is {value!r}; give one of {', '.join(letters)}, or its number from 0")


def _num_choices(question: Question) -> int:
    choices = question.row.get("choices", question.row.get("options"))
    if choices is None:
        return len(LETTERS)
    if not isinstance(choices, list | tuple | Mapping) or not 1 <= len(choices) <= len(LETTERS):
        question.fail(f"the choices are no list of at most {len(LETTERS)}; give their texts")
    return len(choices)


def _has_image(question: Question) -> bool | None:
    """Whether the question has a picture; None if the reference says nothing."""
    row = question.row
    if "has_image" in row:
        if not isinstance(row["has_image"], bool):
            question.fail(f'"has_image" is {row["has_image"]!r}; give true or false')
        return bool(row["has_image"])
    return bool(row["image"]) if "image" in row else None
