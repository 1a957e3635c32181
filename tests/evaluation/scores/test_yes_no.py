"""POPE and MME: what counts as yes and no, and the numbers made of it.

Expected values were worked out by hand from eval_pope.py of LLaVA and calculation.py of MME.
"""

from __future__ import annotations

from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.scores import Scores, score_rows
from megamm.evaluation.scores.mme import COGNITION, PERCEPTION, answer
from megamm.evaluation.scores.pope import says_yes


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        ("yes", True),
        ("Yes.", True),
        ("no", False),
        ("No", False),
        ("No.", False),
        ("NO", True),  # only No, no and not
        ("nO", True),
        ("Not", True),
        ("not", False),
        ("", True),
        (" no", False),
        ("no ", False),
        ("No, there is no dog.", False),
        ("No,there is a dog", True),  # "Nothere"
        ("no!", True),
        ("no\n", True),
        ("No\nthere", True),
        ("no\t", True),
        ("There is not a dog", False),
        ("There isn't a dog", True),
        ("There is a dog. No cat.", True),  # the first sentence alone
        (".no", True),  # which is empty here
        ("...", True),
        ("nothing", True),
        ("none", True),
        ("I know", True),
        ("cannot see", True),
        ("there is, no, dog", False),
        ("'no'", True),
        ("Yes or no", False),
        ("maybe", True),
        ("No-one", True),
    ],
)
def test_pope_answers(text: str, is_yes: bool) -> None:
    assert says_yes(text) is is_yes


def scored(metric: str, references: list[dict[str, Any]], predictions: dict[Any, str]) -> Scores:
    rows = [{"id": key, "prediction": text} for key, text in predictions.items()]
    return score_rows(metric, rows, references)


def test_pope_numbers() -> None:
    """3 true yes, 1 false yes, 2 true no, 2 false no."""
    labels = ["yes"] * 5 + ["no"] * 3
    texts = ["yes"] * 3 + ["no"] * 2 + ["no"] * 2 + ["yes"]
    references = [{"id": n, "label": label} for n, label in enumerate(labels)]
    found = scored("pope", references, dict(enumerate(texts)))
    assert found.numbers == {
        "accuracy": pytest.approx(62.5),
        "precision": pytest.approx(75.0),
        "recall": pytest.approx(60.0),
        "f1": pytest.approx(100 * 2 * 0.75 * 0.6 / 1.35),
        "yes_ratio": pytest.approx(50.0),
    }
    assert found.groups == {}


def test_pope_headline_is_the_mean_over_splits() -> None:
    """Not F1 of all questions together: splits of different sizes weigh the same."""
    references = [
        {"id": 1, "label": "yes", "split": "random"},
        {"id": 2, "label": "no", "split": "random"},
        {"id": 3, "label": "yes", "split": "popular"},
        {"id": 4, "label": "no", "split": "popular"},
        {"id": 5, "label": "no", "split": "popular"},
        {"id": 6, "label": "no", "split": "popular"},
    ]
    found = scored("pope", references, {1: "yes", 2: "no", 3: "yes", 4: "yes", 5: "yes", 6: "yes"}).as_dict()
    assert found["by_split"]["random"]["f1"] == 100.0
    assert found["by_split"]["popular"]["f1"] == pytest.approx(40.0)
    assert found["f1"] == pytest.approx(70.0)
    assert found["accuracy"] == pytest.approx((100 + 25) / 2)
    assert found["yes_ratio"] == pytest.approx((50 + 100) / 2)
    assert found["by_split"]["popular"]["n"] == 4


def test_pope_without_any_yes() -> None:
    found = scored("pope", [{"id": 1, "label": "yes"}, {"id": 2, "label": "no"}], {1: "no", 2: "no"})
    assert found.numbers == {"accuracy": 50.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


def test_pope_unanswered_counts_as_the_wrong_answer() -> None:
    references = [{"id": n, "label": label} for n, label in enumerate(["yes", "no", "yes"])]
    found = scored("pope", references, {0: "yes"})
    assert found.numbers["accuracy"] == pytest.approx(100 / 3)
    assert found.numbers["precision"] == 50.0 and found.numbers["recall"] == 50.0
    assert found.counts == {"n": 3, "unanswered": 2, "unknown": 0}


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ([{"id": 1, "label": "maybe"}], "the label is 'maybe'; give yes or no"),
        ([{"id": 1}], 'has no "label"'),
        ([{"id": 1, "label": True}], "the label is True; give text"),
        (
            [{"id": 1, "label": "no", "split": "random"}, {"id": 2, "label": "no"}],
            'references: row 2: has no "split"',
        ),
    ],
)
def test_pope_bad_references(references: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored("pope", references, {1: "yes"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes.", "yes"),
        ("No, it is not", "no"),
        ("yes\n", "yes"),
        (" yes", "yes"),
        ("  yes", "other"),  # only four characters are looked at
        ("  no", "no"),
        ("   no", "other"),
        ("(yes)", "yes"),
        ("((yes", "other"),
        ("not", "no"),
        ("Not sure", "no"),
        ("none", "no"),
        ("know", "no"),
        ("I know", "other"),
        ("yesterday", "yes"),
        ("eyes", "yes"),
        ("snow", "no"),
        ("", "other"),
        ("ye", "other"),
        ("maybe", "other"),
        ("the answer is yes", "other"),
        ("*no*", "no"),
        ("a no", "no"),
        ("oyes", "yes"),
        ("yno", "no"),
        ("n o", "other"),
        ("y", "other"),
    ],
)
def test_mme_answers(text: str, expected: str) -> None:
    assert answer(text) == expected


def mme_references(task: str, images: int) -> list[dict[str, Any]]:
    return [
        {"id": f"{task}/{n}/{label}", "task": task, "image": f"{n}.jpg", "label": label}
        for n in range(images)
        for label in ("Yes", "No")
    ]


def test_mme_all_right() -> None:
    references = [row for task in (*PERCEPTION, *COGNITION) for row in mme_references(task, 2)]
    found = scored("mme", references, {row["id"]: row["label"] for row in references})
    assert found.numbers == {"perception": 2000.0, "cognition": 800.0}
    assert found.counts["missing_tasks"] == 0 and found.notes == ()
    assert list(found.groups["by_task"]) == [*PERCEPTION, *COGNITION]


def test_mme_needs_both_questions_for_the_plus() -> None:
    """4 of 6 questions right, 1 of 3 pictures; "other" is wrong for either label."""
    references = mme_references("count", 3)
    texts = ["yes", "no", "yes", "yes", "unsure", "no"]
    found = scored("mme", references, {row["id"]: text for row, text in zip(references, texts, strict=True)})
    accuracy, plus = 100 * 4 / 6, 100 / 3
    assert found.groups["by_task"]["count"] == {
        "score": pytest.approx(accuracy + plus),
        "accuracy": pytest.approx(accuracy),
        "accuracy_plus": pytest.approx(plus),
        "n": 6,
    }
    assert found.numbers == {"perception": pytest.approx(accuracy + plus), "cognition": None}
    assert found.counts == {
        "n": 6,
        "unanswered": 0,
        "unknown": 0,
        "neither_yes_nor_no": 1,
        "missing_tasks": 13,
    }
    assert "existence" in found.notes[0]


def test_mme_same_picture_in_two_tasks_and_unanswered() -> None:
    references = [*mme_references("OCR", 1), *mme_references("code_reasoning", 1)]
    found = scored("mme", references, {"OCR/0/Yes": "yes", "code_reasoning/0/No": "No", "other": "no"})
    assert found.numbers == {"perception": 50.0, "cognition": 50.0}
    assert found.counts["unanswered"] == 2 and found.counts["unknown"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "counting"}, "has the task 'counting'; give \"task\", one of existence, count"),
        ({"task": None}, "has no task"),
        ({"image": None}, 'has no "image"'),
        ({"image": "other.jpg"}, "asks 1 questions about"),
        ({"label": "maybe"}, "the label is 'maybe'"),
    ],
)
def test_mme_bad_references(change: dict[str, Any], message: str) -> None:
    references = mme_references("count", 1)
    references[1] |= change
    with pytest.raises(InputError, match=message):
        scored("mme", references, {row["id"]: "yes" for row in references})
