"""MME (Fu et al. 2023; calculation.py of its eval_tool): two questions about each picture, one of them to be
denied.

A task scores acc + acc+ of at most 200: percent of the questions, and percent of the pictures with both
questions right. Perception is the sum over ten tasks (2000), cognition over four (800).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megamm.evaluation.scores.pairing import Question, group_name, paired, text_label
from megamm.evaluation.scores.result import Numbers, Scores, percent

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork"),
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
_NAMES = {name.lower(): name for name in TASKS}
_PER_IMAGE = 2
_PREFIX = 4  # characters of a prediction that are looked at


def score_mme(predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> Scores:
    """The sums over perception and cognition, and each task with what it consists of.

    A sum over tasks of which the references have none is None; `missing_tasks` counts those that they lack,
    which add nothing.

    Args:
        references: {"id", "task", "image", "label": "yes" or "no"}.
    Raises:
        InputError: of `paired`; an unknown task; a label that is neither; a picture of a task with other than
            two questions. Predictions without a reference are counted only.
    """
    pairs = paired(predictions, references, strict=False)
    tasks: dict[str, dict[str, list[Question]]] = {}
    for question in pairs.questions:
        tasks.setdefault(_task(question), {}).setdefault(_image(question), []).append(question)
    parts = {name: _task_score(name, tasks[name]) for name in TASKS if name in tasks}
    missing = [name for name in TASKS if name not in tasks]
    other = sum(q.prediction is not None and answer(q.prediction) == "other" for q in pairs.questions)
    numbers: Numbers = {"perception": _sum(parts, PERCEPTION), "cognition": _sum(parts, COGNITION)}
    notes = (f"tasks without questions, which add nothing: {', '.join(missing)}",) if missing else ()
    counts = {**pairs.counts, "neither_yes_nor_no": other, "missing_tasks": len(missing)}
    return Scores("mme", numbers, counts, {"by_task": parts}, notes)


def answer(text: str) -> str:
    """What a prediction says: "yes", "no" or "other"."""
    start = text.lower()[:_PREFIX]
    return next((word for word in ("yes", "no") if word in start), "other")


def _task_score(name: str, images: Mapping[str, Sequence[Question]]) -> dict[str, float]:
    right, both = [], []
    for image, questions in images.items():
        if len(questions) != _PER_IMAGE:
            questions[0].fail(
                f"task {name} asks {len(questions)} questions about {image!r}, where MME asks {_PER_IMAGE};"
                " give the whole task"
            )
        flags = [q.prediction is not None and answer(q.prediction) == _expected(q) for q in questions]
        right += flags
        both.append(all(flags))
    accuracy, plus = percent(right), percent(both)
    return {"score": accuracy + plus, "accuracy": accuracy, "accuracy_plus": plus, "n": len(right)}


def _sum(parts: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> float | None:
    scores = [parts[name]["score"] for name in names if name in parts]
    return sum(scores) if scores else None


def _task(question: Question) -> str:
    name = group_name(question, "task") or group_name(question, "category")
    if name is None or name.lower() not in _NAMES:
        found = "no task" if name is None else f"the task {name!r}"
        question.fail(f'has {found}; give "task", one of {", ".join(TASKS)}')
    return _NAMES[name.lower()]


def _image(question: Question) -> str:
    name = group_name(question, "image")
    if name is None:
        question.fail('has no "image"; give the name of the picture, which two questions share')
    return name


def _expected(question: Question) -> str:
    expected = text_label(question).strip().lower()
    if expected not in ("yes", "no"):
        question.fail(f"the label is {expected!r}; give yes or no")
    return expected
