"""MMBench with circular evaluation (Liu et al. 2023; multiple_choice.py and matching_util.py of VLMEvalKit).

The rotations of a question have the same index but for its millions. It is right only if all of them are.
Which option a prediction means is found by exact matching: VLMEvalKit asks a language model where that finds
none, this does not, so such predictions are wrong (and counted as "unmatched").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from string import ascii_uppercase
from typing import Any

from megamm.evaluation.scores.pairing import Question, group_name, paired, text_label
from megamm.evaluation.scores.result import Groups, Scores, accuracy_by, percent

NO_OPTION = "Z"  # what refuses to answer, or says so
_MILLION = 1_000_000
_LETTERS = "ABCD"
_SPACED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_KINDS = {"by_l2_category": "l2-category", "by_category": "category", "by_split": "split"}


def score_mmbench(
    predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]
) -> Scores:
    """Accuracy of whole questions; `vanilla_accuracy` of their first rotations, `row_accuracy` of all rows.

    Args:
        references: {"id" or "index": whole number, "label" or "answer": letter, "A": text, "B": text, ...} or
            with "options": a list or an object instead of the letters (without texts, only letters A to D are
            found); "category", "l2-category" and "split" are reported by.
    Raises:
        InputError: of `paired`; an index that is no number; a label that is no letter of an option.
            Predictions without a reference are counted only.
    """
    pairs = paired(predictions, references, strict=False)
    rotations: dict[int, list[tuple[int, Question, bool]]] = {}
    unmatched = 0
    for question in pairs.questions:
        index, given = _index(question), _given(question)
        unmatched += given is None and question.prediction is not None
        right = given == _label(question)
        rotations.setdefault(index % _MILLION, []).append((index, question, right))
    firsts = [min(group, key=lambda rotation: rotation[0]) for group in rotations.values()]
    wholes = [all(right for _, _, right in group) for group in rotations.values()]
    numbers: dict[str, float | None] = {
        "accuracy": percent(wholes),
        "vanilla_accuracy": percent(right for _, _, right in firsts),
        "row_accuracy": percent(right for group in rotations.values() for _, _, right in group),
    }
    groups: Groups = {}
    for name, key in _KINDS.items():
        names = (group_name(question, key) for _, question, _ in firsts)
        if found := accuracy_by(zip(names, wholes, strict=True)):
            groups[name] = found
    counts = {**pairs.counts, "questions": len(wholes), "unmatched": unmatched}
    note = f"{unmatched} predictions name no option, or several, and count as wrong (nobody judges them)"
    return Scores("mmbench", numbers, counts, groups, (note,) if unmatched else ())


def option_of(prediction: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that a prediction means; `NO_OPTION` for a refusal; None if none is clear.

    Args:
        options: letter -> text.
    """
    return _by_letter(prediction, options) or _by_text(prediction, options)


def _by_letter(prediction: str, options: Mapping[str, str]) -> str | None:
    """The one letter that stands alone as a word, brackets and punctuation aside."""
    if _FAILED in prediction:
        return None
    if any(refusal in prediction for refusal in _REFUSALS):
        return NO_OPTION
    words = set(prediction.translate(_SPACED).split())
    found = [letter for letter in options if letter in words]
    if len(found) == 1:
        return found[0]
    return NO_OPTION if not found and NO_OPTION in words else None


def _by_text(prediction: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text the prediction contains, letters' case aside."""
    text = prediction.lower()
    found = [letter for letter, option in options.items() if option and option.lower() in text]
    return found[0] if len(found) == 1 else None


def _given(question: Question) -> str | None:
    if question.prediction is None:
        return None
    return option_of(question.prediction, _options(question))


def _options(question: Question) -> dict[str, str]:
    """Letter -> text; empty texts for a reference without any."""
    row = question.row
    given = row.get("options", {letter: row[letter] for letter in ascii_uppercase if letter in row})
    if isinstance(given, list | tuple):
        given = dict(zip(ascii_uppercase, given, strict=False))
    if not isinstance(given, Mapping):
        question.fail('"options" is neither a list nor an object; give the texts of A, B, ...')
    texts = {str(letter): _option_text(question, value) for letter, value in given.items()}
    found = {letter: text for letter, text in texts.items() if text is not None}
    return found or dict.fromkeys(_LETTERS, "")


def _option_text(question: Question, value: Any) -> str | None:
    """None for an option that is not there: questions with fewer than four have empty cells in the table."""
    if value is None or value != value or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        question.fail(f"an option is {value!r}; give text")
    return str(value)


def _label(question: Question) -> str:
    expected = text_label(question)
    if expected not in _options(question):
        question.fail(f"the label is {expected!r}, which is none of its options; give the letter of one")
    return expected


def _index(question: Question) -> int:
    value = str(question.row.get("index", question.id))
    if not re.fullmatch(r"[0-9]{1,18}", value):
        question.fail(f'the index is {value!r}; give MMBench\'s whole number, in "index" or "id"')
    return int(value)
