"""Which prediction belongs to which reference, and what is wrong with rows.

Ids are whole numbers or text; 1 and "1" are the same question. Two rows with the same id are an error,
a question without a prediction is not: it counts as wrong, and is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from megamm.errors import InputError
from megamm.evaluation.scores.rows import ID_KEYS, PREDICTION_KEYS, Row


@dataclass(frozen=True, slots=True)
class Question:
    """A reference with what was predicted for it.

    Attributes:
        id: as text.
        row: the reference.
        place: where the reference stands, for messages.
        prediction: None if there is none.
    """

    id: str
    row: Mapping[str, Any]
    place: str
    prediction: str | None

    def fail(self, what: str) -> NoReturn:
        """Raise InputError about the reference: `what` says what is wrong, and the remedy."""
        raise InputError(f"{self.place}: {what}")


@dataclass(frozen=True)
class Paired:
    """All questions, in the order of the references.

    Attributes:
        unknown: predictions that belong to none.
    """

    questions: Sequence[Question]
    unknown: int

    @property
    def counts(self) -> dict[str, int]:
        """How many questions there are, and how many predictions are missing or belong to none."""
        unanswered = sum(question.prediction is None for question in self.questions)
        return {"n": len(self.questions), "unanswered": unanswered, "unknown": self.unknown}


def paired(
    predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]], strict: bool
) -> Paired:
    """Find the prediction of every reference.

    Args:
        strict: a prediction for an id that no reference has is an error, as in the official evaluators of
            VQA and COCO; otherwise it is counted and left out, as in that of GQA.
    Raises:
        InputError: no rows; a row without an id or a text; an id twice; no prediction with the id of a
            reference.
    """
    predicted = _by_id(predictions, "predictions")
    known = _by_id(references, "references")
    unknown = [row_id for row_id in predicted if row_id not in known]
    if unknown and (strict or len(unknown) == len(predicted)):
        place = predicted[unknown[0]][0]
        others = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise InputError(
            f"{place}: no reference has the id {unknown[0]!r}{others}; give predictions and references"
            " of the same questions"
        )
    questions = []
    for row_id, (place, row) in known.items():
        found = predicted.get(row_id)
        questions.append(Question(row_id, row, place, None if found is None else _prediction(*found)))
    return Paired(questions, len(unknown))


def row_id(row: Mapping[str, Any], place: str) -> str:
    """The id of a row, as text. A caption belongs to the image; an "id" beside it is that of the caption."""
    keys = ("image_id", *ID_KEYS) if "caption" in row and "prediction" not in row else ID_KEYS
    for key in keys:
        if key in row:
            value = row[key]
            if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
                return str(value)
            raise InputError(f'{place}: "{key}" is {value!r}; give a whole number or text')
    raise InputError(f'{place}: has no "id"; give every row that of its question')


def placed(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows with their places; those that come from no file are counted from 1."""
    for number, row in enumerate(rows, start=1):
        place = row.place if isinstance(row, Row) else f"{name}: row {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: is no mapping; give rows with an id")
        yield place, row


def _by_id(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, tuple[str, Mapping[str, Any]]]:
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for place, row in placed(rows, name):
        key = row_id(row, place)
        if key in found:
            earlier = _nearby(found[key][0], place)
            raise InputError(f"{place}: the id {key!r} stands in {earlier} already; leave one of them out")
        found[key] = place, row
    if not found:
        raise InputError(f"{name}: there are none; give at least one row")
    return found


def _nearby(earlier: str, later: str) -> str:
    """A place without the file's name where that is the same as in another one."""
    path, _, rest = earlier.rpartition(": ")
    return rest if later.startswith(f"{path}: ") else earlier


def _prediction(place: str, row: Mapping[str, Any]) -> str:
    for key in PREDICTION_KEYS:
        if key in row:
            if isinstance(row[key], str):
                return str(row[key])
            raise InputError(f'{place}: "{key}" is {_shown(row[key])}; give text')
    raise InputError(f'{place}: has no "prediction"; give the text that the model answered')


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def label(question: Question, keys: Sequence[str] = ("label", "answer")) -> Any:
    """The right answer of a reference: under one of `keys`, or the only one of "answers"."""
    for key in keys:
        if key in question.row:
            return question.row[key]
    answers = question.row.get("answers")
    if isinstance(answers, list | tuple) and len(answers) == 1:
        return answers[0]
    question.fail(f'has no "{keys[0]}"; give the right answer there')


def text_label(question: Question) -> str:
    """`label`, which has to be text."""
    found = label(question)
    if not isinstance(found, str):
        question.fail(f"the label is {_shown(found)}; give text")
    return found


def group_name(question: Question, key: str) -> str | None:
    """What a reference says under `key`; None if nothing."""
    value = question.row.get(key)
    if value is None:
        return None
    if not isinstance(value, str | int) or isinstance(value, bool):
        question.fail(f'"{key}" is {_shown(value)}; give text')
    return str(value)
