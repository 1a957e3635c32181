"""MMMU (Yue et al. 2023): accuracy over all questions, as its main_parse_and_eval.py counts.

An answer to a multiple-choice question that names no option becomes a random one, of Python's generator with
seed 42: the evaluator draws in the order of its subjects and, within one, of the questions, so this does. (A
question that was not answered draws nothing, and is wrong.)
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from string import ascii_uppercase
from typing import Any

from megamm.evaluation.scores.mmmu_parsing import choice_of, matches, open_answers
from megamm.evaluation.scores.pairing import Question, group_name, paired
from megamm.evaluation.scores.result import Groups, Scores, accuracy_by, percent

SEED = 42
MULTIPLE_CHOICE = "multiple-choice"
_LETTERS = "ABCD"
# In the order in which the evaluator goes through them.
SUBJECTS = (
    *(
        "Accounting",
        "Agriculture",
        "Architecture_and_Engineering",
        "Art",
        "Art_Theory",
        "Basic_Medical_Science",
    ),
    *("Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design"),
    *(
        "Diagnostics_and_Laboratory_Medicine",
        "Economics",
        "Electronics",
        "Energy_and_Power",
        "Finance",
        "Geography",
    ),
    *("History", "Literature", "Manage", "Marketing", "Materials", "Math", "Mechanical_Engineering", "Music"),
    *("Pharmacy", "Physics", "Psychology", "Public_Health", "Sociology"),
)
DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        *("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy"),
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        *(
            "Agriculture",
            "Architecture_and_Engineering",
            "Computer_Science",
            "Electronics",
            "Energy_and_Power",
        ),
        *("Materials", "Mechanical_Engineering"),
    ),
}
_DISCIPLINE_OF = {subject: name for name, subjects in DISCIPLINES.items() for subject in subjects}


def score_mmmu(predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> Scores:
    """Accuracy over all questions, by subject and by discipline where ids tell (validation_Art_Theory_3).

    Args:
        references: {"id", "label": letter, text, or a list of those that are right[, "question_type":
            "multiple-choice" or "open"][, "options": [text, ...]]}; those with options are multiple choice,
            and those with nothing but a letter from A to D for label.
    Raises:
        InputError: of `paired`; also for a prediction without a reference; multiple choice without options.
    """
    pairs = paired(predictions, references, strict=True)
    subjects = {question.id: subject_of(question) for question in pairs.questions}
    generator = random.Random(SEED)
    flags, drawn = {}, 0
    for question in sorted(pairs.questions, key=lambda one: _turn(subjects[one.id])):
        flags[question.id], is_drawn = _judged(question, generator)
        drawn += is_drawn
    rights = [float(flags[question.id]) for question in pairs.questions]
    names = [subjects[question.id] for question in pairs.questions]
    groups: Groups = {}
    if found := accuracy_by(zip((_DISCIPLINE_OF.get(name or "") for name in names), rights, strict=True)):
        groups["by_discipline"] = found
    if found := accuracy_by(zip(names, rights, strict=True)):
        groups["by_subject"] = found
    notes = (f"{drawn} answers name no option and became random ones (seed {SEED})",) if drawn else ()
    return Scores("mmmu", {"accuracy": percent(rights)}, {**pairs.counts, "random": drawn}, groups, notes)


def subject_of(question: Question) -> str | None:
    """The subject in an id, split_Subject_number, or what the reference says under "subject"."""
    named = group_name(question, "subject")
    inner = "_".join(question.id.split("_")[1:-1])
    return named or (inner if inner in _DISCIPLINE_OF else None)


def _turn(subject: str | None) -> int:
    """When a subject comes; those that MMMU does not know come last, in the order of the references."""
    return SUBJECTS.index(subject) if subject in _DISCIPLINE_OF else len(SUBJECTS)


def _judged(question: Question, generator: random.Random) -> tuple[bool, bool]:
    """Whether the answer is right, and whether it was drawn."""
    options, expected = _options(question), _expected(question)
    if question.prediction is None:
        return False, False
    if not options:
        return matches(open_answers(question.prediction), expected), False
    choice = choice_of(question.prediction, options)
    return (choice or generator.choice(list(options))) in expected, choice is None


def _options(question: Question) -> dict[str, str | None]:
    """Letter -> text; nothing for an open question. Where a reference has a letter for label and says nothing
    else, the texts are not known."""
    given, kind = question.row.get("options") or {}, question.row.get("question_type")
    if kind is None and not given and question.row.get("label") in (*_LETTERS,):
        return dict.fromkeys(_LETTERS)
    if (kind or (MULTIPLE_CHOICE if given else "open")) != MULTIPLE_CHOICE:
        return {}
    if isinstance(given, list | tuple):
        given = dict(zip(ascii_uppercase, given, strict=False))
    if not isinstance(given, Mapping) or not given:
        question.fail('is multiple choice and has no "options"; give the list of their texts')
    return {str(letter): str(text) for letter, text in given.items()}


def _expected(question: Question) -> list[str]:
    value = next((question.row[key] for key in ("label", "answer", "answers") if key in question.row), None)
    values = value if isinstance(value, list | tuple) else [value]
    for one in values:
        if not isinstance(one, str | int | float) or isinstance(one, bool):
            question.fail(f"the label is {one!r}; give text, or a list of texts")
    if not values:
        question.fail("the label is an empty list; give text, or a list of texts")
    return [str(one) for one in values]
