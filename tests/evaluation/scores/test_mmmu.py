"""MMMU: what an answer means, what is drawn where it means nothing, and the breakdown.

Expected values were worked out by hand from MMMU's eval_utils.py, main_parse_and_eval.py and data_utils.py.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.scores import Scores, score_rows
from megamm.evaluation.scores.mmmu import DISCIPLINES, SUBJECTS
from megamm.evaluation.scores.mmmu_parsing import choice_of, forms, matches, open_answers

OPTIONS = {"A": "a red car", "B": "Blue", "C": "green tea", "D": "12"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("A", "A"),
        ("A.", "A"),
        ("'B'", "B"),
        ("(C)", "C"),
        ("C)", None),
        ("(c)", None),
        ("b", None),
        ("B. Blue", None),  # " B. " is not " B ", and two words are too few for texts
        ("B Blue", "B"),
        ("Answer: D", "D"),
        ("Answer:D", None),
        ("The answer is A", "A"),
        ("A or B", "B"),  # the last
        ("B or A", "A"),
        ("(A) or (B)", "B"),
        ("(B), then (A), then (B)", "B"),
        ("(A) B C", "A"),  # brackets come before letters alone
        ("A and (B) and C", "B"),
        ("A, B", "B"),  # "A," is none
        ("A cat", "A"),
        ("A\nB", None),
        ("A,", "A"),
        ("!?A?!", "A"),
        (",.A", "A"),  # one kind of mark after the other, commas first
        (".,A", None),
        ("!.A", None),
        (" A ", "A"),
        ("blue", None),
        ("it is just blue I think so", "B"),
        ("I think it is blue today", "B"),
        ("I think it is blue", None),  # five words
        ("blue or green tea but not both", "C"),  # the text that stands last
        ("green tea or blue but not both", "B"),
        ("the number of them is 12 or so", "D"),
        ("E", None),
        ("", None),
        ("...", None),
        ("I think E is right in here", None),
    ],
)
def test_choices(response: str, expected: str | None) -> None:
    assert choice_of(response, OPTIONS) == expected


def test_first_of_the_texts_that_begin_together() -> None:
    options = {"A": "red", "B": "red car", "C": "car"}
    assert choice_of("what I can see is red car", {"A": "red", "B": "red car"}) == "A"
    assert choice_of("what I can see is red car", options) == "C"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("5", {5.0}),
        ("5.", {5.0}),
        ("5.678", {5.68}),
        ("1,000", {1000.0, 0.0}),  # what stands behind a comma is a number of its own, too
        ("-3", {-3.0}),
        ("x", {" x", "x "}),
        ("Paris", {"paris"}),
        ("", {""}),
        ("The answer is 5", {5.0}),
        ("the answer is Paris.", {"paris"}),
        ("x = 5", {5.0}),
        ("It could be so that the result is 7 m", {"7 m", 7.0}),
        ("The answer is: 5", {"is: 5", 5.0}),  # "answer " introduces it, "is:" does not
        ("so it is about 3.5 km", {"about 3.5 km", 3.5}),
        ("1,234,567 people", {"1,234,567 people", 1234567.0, 567.0}),
        ("1.5e-3", {0.0, 1.0, -3.0}),
        ("about 2e3", {"about 2e3", 2000.0, 3.0}),
        (".5 l", {"5 l", 5.0}),  # full stops go at both ends
        ("is .5 l", {".5 l", 0.5}),
        ("12 and 13", {"12 and 13", 12.0, 13.0}),
        ("Thus 4\nfinal 5", {4.0, 5.0}),
        ("a = 4\nb = 5", {5.0}),  # only the last line may be an equation
        ("line one\nline two", {"line one\nline two"}),
        ("The answer is :", {"the answer is :"}),  # nothing but a mark behind it
        ("It is 5. So it is 6", {6.0}),  # sentences are not split
        ("so ", {"so"}),
        ("50%", {"50%", 50.0}),
        ("$1,000", {"$1,000", 1000.0, 0.0}),
        ("abc1", {"abc1", 1.0}),
        ("1a", {"1a"}),
        ("-1/2", {"-1/2", -1.0, 2.0}),
        ("inf", {float("inf")}),
    ],
)
def test_open_answers(response: str, expected: set[str | float]) -> None:
    assert open_answers(response) == expected


@pytest.mark.parametrize(
    ("response", "expected", "is_right"),
    [
        ("5", "5.0", True),
        ("5.004", "5", True),
        ("5.01", "5", False),
        ("The result is 1,000 kg", "1000", True),
        ("about 1000 kg", "1000 kg", True),
        ("Paris, France", "paris", True),
        ("par", "Paris", False),
        ("parisian", "Paris", True),
        ("x", "x", True),
        ("the variable x", "x", True),
        ("max", "x", False),
        ("-5", "5", False),
        ("12 or 13", "13", True),
        ("yes", "no", False),
    ],
)
def test_open_questions(response: str, expected: str, is_right: bool) -> None:
    assert matches(open_answers(response), [expected]) is is_right


def test_forms() -> None:
    assert forms(" 1,234.567 ") == [1234.57]
    assert forms("A") == [" a", "a "]
    assert forms("AB ") == ["ab"]


def scored(references: list[dict[str, Any]], predictions: dict[Any, str]) -> Scores:
    rows = [{"id": key, "prediction": text} for key, text in predictions.items()]
    return score_rows("mmmu", rows, references)


def choice(number: int, subject: str, label: Any = "A") -> dict[str, Any]:
    return {"id": f"validation_{subject}_{number}", "label": label, "options": ["w", "x", "y", "z"]}


def test_what_names_no_option_is_drawn_in_the_order_of_the_evaluator() -> None:
    """Accounting comes before Art although its questions stand behind."""
    generator = random.Random(42)
    drawn = [generator.choice("ABCD") for _ in range(3)]
    assert drawn == ["A", "A", "C"]
    references = [
        choice(1, "Art", drawn[2]),
        choice(2, "Accounting", drawn[0]),
        choice(1, "Accounting", drawn[1]),
    ]
    found = scored(references, {row["id"]: "no idea" for row in references})
    assert found.numbers == {"accuracy": 100.0}
    assert found.counts["random"] == 3 and "seed 42" in found.notes[0]
    in_file_order = scored([choice(1, "Art", drawn[0])], {"validation_Art_1": "no idea"})
    assert in_file_order.numbers == {"accuracy": 100.0}


def test_answers_that_name_an_option_and_missing_ones_draw_nothing() -> None:
    references = [choice(n, "Art", "A") for n in range(1, 4)]
    found = scored(references, {"validation_Art_2": "B", "validation_Art_3": "?"})
    assert found.numbers["accuracy"] == pytest.approx(100 / 3)  # the first draw is A
    assert found.counts == {"n": 3, "unanswered": 1, "unknown": 0, "random": 1}


def test_breakdown() -> None:
    references = [
        choice(1, "Art_Theory"),
        choice(1, "Accounting"),
        choice(2, "Accounting", ["B", "C"]),
        {"id": "validation_Math_7", "label": ["0.5", "1/2"], "question_type": "open"},
        {"id": "other", "answer": "Paris", "question_type": "open", "options": []},
    ]
    texts = ["A", "B", "C", "The result is .5", "in Paris"]
    found = scored(
        references, {row["id"]: text for row, text in zip(references, texts, strict=True)}
    ).as_dict()
    assert found["accuracy"] == pytest.approx(80.0)
    assert found["by_subject"] == {
        "Accounting": {"accuracy": 50.0, "n": 2},
        "Art_Theory": {"accuracy": 100.0, "n": 1},
        "Math": {"accuracy": 100.0, "n": 1},
    }
    assert found["by_discipline"]["Business"] == {"accuracy": 50.0, "n": 2}
    assert set(found["by_discipline"]) == {"Art and Design", "Business", "Science"}


def test_letters_without_options_are_multiple_choice() -> None:
    references: list[dict[str, Any]] = [
        {"id": 1, "label": "A"},
        {"id": 2, "label": "B"},
        {"id": 3, "label": "E"},
    ]
    found = scored(references, {1: "(A)", 2: "It is (A), no, (B)", 3: "(E)"})
    assert found.numbers["accuracy"] == pytest.approx(200 / 3)  # the last one is open
    assert found.counts["random"] == 0
    opened = scored([{"id": 1, "label": "A", "question_type": "open"}], {1: "(A)"})
    assert opened.numbers["accuracy"] == 0.0


def test_tables() -> None:
    assert len(SUBJECTS) == len(set(SUBJECTS)) == 30 and len(DISCIPLINES) == 6
    assert sorted(SUBJECTS) == sorted(name for names in DISCIPLINES.values() for name in names)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (
            {"id": 1, "label": "A", "question_type": "multiple-choice"},
            'is multiple choice and has no "options"',
        ),
        ({"id": 1, "label": "A", "options": "w, x"}, 'has no "options"'),
        ({"id": 1, "options": ["w", "x"]}, "the label is None"),
        ({"id": 1, "label": []}, "the label is an empty list"),
        ({"id": 1, "label": [["A"]]}, "the label is"),
    ],
)
def test_bad_references(reference: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored([reference], {1: "A"})
