"""MMBench, ScienceQA and GQA: which option a prediction names, and what counts as right.

Expected values were worked out by hand from VLMEvalKit's matching_util.py and multiple_choice.py, LLaVA's
eval_science_qa.py and convert_gqa_for_eval.py, and GQA's eval.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.scores import Scores, score_rows
from megamm.evaluation.scores.gqa import converted
from megamm.evaluation.scores.mmbench import option_of
from megamm.evaluation.scores.scienceqa import letter_of

ANIMALS = {"A": "cat", "B": "dog", "C": "a bird", "D": "Fish"}


def scored(metric: str, references: list[dict[str, Any]], predictions: dict[Any, str]) -> Scores:
    rows = [{"id": key, "prediction": text} for key, text in predictions.items()]
    return score_rows(metric, rows, references)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("[D]", "D"),
        ("D:", "D"),
        ("B. dog", "B"),
        ("B.dog", "B"),
        ("*B*", "B"),
        ("**B**", "B"),
        ("{C}", "C"),
        ("Answer: B", "B"),
        ("The answer is C", "C"),
        ("the answer is #D!", "D"),
        ("A;", "A"),
        ("B\n", "B"),
        ("A cat", "A"),  # an article is taken for the letter
        ("A dog", "A"),
        ("b", None),  # small letters are no options
        ("A or B", None),  # two letters, and no text of an option
        ("A or B: cat", "A"),  # two letters, but one text
        ("cat", "A"),
        ("It is a CAT", "A"),
        ("a fish", "D"),
        ("a bird", "C"),
        ("bird", None),  # the option is "a bird"
        ("cats", "A"),
        ("cat and dog", None),
        ("concatenate", "A"),
        ("A/B", None),
        ("A-B", None),
        ("E", None),  # no such option
        ("Z", "Z"),
        ("Z or A", "A"),
        ("", None),
        ("horse", None),
        ("Cannot determine the answer, perhaps A", "Z"),
        ("I can't process this file.", "Z"),
        ("Failed to obtain answer via API B", None),
        ("Failed to obtain answer via API: dog", "B"),
    ],
)
def test_mmbench_options(text: str, expected: str | None) -> None:
    assert option_of(text, ANIMALS) == expected


def rotated(index: int, rotations: int, **more: Any) -> list[dict[str, Any]]:
    """Rotations of a question whose right answer is "cat"."""
    texts = list(ANIMALS.values())[:rotations] if rotations > 1 else ["cat", "dog"]
    rows = []
    for turn in range(rotations):
        turned = texts[-turn:] + texts[:-turn] if turn else texts
        options = dict(zip("ABCD", turned, strict=False))
        label = next(letter for letter, text in options.items() if text == "cat")
        rows.append({"id": index + turn * 1_000_000, "label": label, **options, **more})
    return rows


def test_mmbench_is_circular() -> None:
    """The first question right in all rotations, the second in three of four, the third in its only one."""
    references = [
        *rotated(7, 4, category="ocr", **{"l2-category": "fine"}),
        *rotated(8, 4, category="color", **{"l2-category": "fine"}),
        *rotated(9, 1, category="color", **{"l2-category": "coarse"}),
    ]
    texts = {row["id"]: row["label"] for row in references}
    texts[2_000_008] = "A"
    found = scored("mmbench", references, texts).as_dict()
    assert found["accuracy"] == pytest.approx(100 * 2 / 3)
    assert found["vanilla_accuracy"] == 100.0
    assert found["row_accuracy"] == pytest.approx(100 * 8 / 9)
    assert (found["n"], found["questions"], found["unmatched"]) == (9, 3, 0)
    assert found["by_category"] == {"color": {"accuracy": 50.0, "n": 2}, "ocr": {"accuracy": 100.0, "n": 1}}
    assert found["by_l2_category"]["fine"] == {"accuracy": 50.0, "n": 2}


def test_mmbench_vanilla_is_the_unrotated_one_and_unanswered_is_wrong() -> None:
    references = list(reversed(rotated(3, 2)))
    found = scored("mmbench", references, {1_000_003: "B"}).as_dict()
    assert (found["accuracy"], found["vanilla_accuracy"], found["row_accuracy"]) == (0.0, 0.0, 50.0)
    assert found["unanswered"] == 1 and found["unmatched"] == 0


def test_mmbench_says_what_it_could_not_match() -> None:
    found = scored("mmbench", rotated(3, 2), {3: "an animal", 1_000_003: "B"})
    assert found.counts["unmatched"] == 1
    assert "1 predictions name no option" in found.notes[0]


def test_mmbench_other_layouts() -> None:
    """Options as a list, "answer" for "label", the index beside another id, cells that are empty."""
    rows = [
        {"id": "q", "index": 5, "answer": "B", "options": ["cat", "dog"]},
        {"id": "r", "index": 6, "answer": "A", "A": "cat", "B": 12, "C": None, "D": float("nan")},
    ]
    assert scored("mmbench", rows, {"q": "dog", "r": "A"}).numbers["accuracy"] == 100.0
    bare = [{"id": 1, "label": "A"}, {"id": 2, "label": "B"}]
    assert scored("mmbench", bare, {1: "(A)", 2: "the dog"}).numbers["accuracy"] == 50.0


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"id": "x1", "label": "A", "A": "cat"}, "the index is 'x1'; give MMBench's whole number"),
        ({"id": 1, "label": "B", "A": "cat"}, "the label is 'B', which is none of its options"),
        ({"id": 1, "label": "E"}, "the label is 'E', which is none of its options"),
        ({"id": 1, "label": "A", "options": 3}, '"options" is neither'),
        ({"id": 1, "label": "A", "A": ["cat"]}, "an option is"),
        ({"id": 1, "A": "cat"}, 'has no "label"'),
    ],
)
def test_mmbench_bad_references(reference: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored("mmbench", [reference], {reference["id"]: "A"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        (" B ", "B"),
        ("B\n", "B"),  # "B. "
        ("\nB", None),  # ". B"
        ("E", "E"),
        ("F", None),
        ("a", None),
        ("", None),
        ("AB", None),
        ("A.", None),
        ("A. ", "A"),
        ("A. cat", "A"),
        ("A.cat", None),
        ("A, cat", None),
        ("A cat", None),
        ("A\ncat", "A"),
        (" A. cat", None),
        ("(A)", None),
        ("A: cat", None),
        ("The answer is B.", "B"),
        ("The answer is B", "B"),
        ("The answer is Big", "B"),
        ("The answer is (B)", None),
        ("the answer is B.", None),
        ("The answer is F.", None),
        ("So: The answer is C. Because of it", "C"),
        ("The answer is A or B. The answer is D.", "D"),  # the one with a full stop comes first
        ("The answer is A, The answer is C", "A"),
        ("The answer is\nB", None),
        ("D. The answer is A.", "D"),
        ("F. The answer is A.", "A"),
        ("The answer is ", None),
        ("Answer: A", None),
    ],
)
def test_scienceqa_letters(text: str, expected: str | None) -> None:
    assert letter_of(text) == expected


def test_scienceqa_pictures_and_numbers_for_labels() -> None:
    references = [
        {"id": "1", "label": "A", "image": "image.png", "subject": "natural science"},
        {"id": "2", "answer": 1, "choices": ["x", "y"], "image": None, "subject": "language science"},
        {"id": "3", "label": "B", "has_image": True, "choices": ["x", "y", "z"]},
        {"id": "4", "label": 0, "image": ""},
    ]
    found = scored("scienceqa", references, {1: "A", 2: "B. y", 3: "C"}).as_dict()
    assert found["accuracy"] == 50.0 and found["image_accuracy"] == 50.0
    assert (found["n"], found["n_image"], found["unanswered"]) == (4, 2, 1)
    assert found["by_subject"]["language science"] == {"accuracy": 100.0, "n": 1}


def test_scienceqa_without_pictures_has_no_number_for_them() -> None:
    found = scored("scienceqa", [{"id": 1, "label": "A"}], {1: "A"})
    assert found.numbers == {"accuracy": 100.0}
    none = scored("scienceqa", [{"id": 1, "label": "A", "image": ""}], {1: "A"})
    assert none.numbers == {"accuracy": 100.0, "image_accuracy": None}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"id": 1, "label": "F"}, "the label is 'F'; give one of A, B, C, D, E"),
        ({"id": 1, "label": "C", "choices": ["x", "y"]}, "the label is 'C'; give one of A, B, or"),
        ({"id": 1, "label": 2, "choices": ["x", "y"]}, "the label is 2"),
        ({"id": 1, "label": True}, "the label is True"),
        ({"id": 1, "label": "A", "choices": []}, "the choices are no list"),
        ({"id": 1, "label": "A", "has_image": "yes"}, "\"has_image\" is 'yes'"),
    ],
)
def test_scienceqa_bad_references(reference: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored("scienceqa", [reference], {1: "A"})


@pytest.mark.parametrize(
    ("text", "label", "is_right"),
    [
        ("cat", "cat", True),
        ("Cat", "cat", True),
        ("CAT.", "cat", True),
        ("cat...", "cat", True),
        ("cat.s", "cat.s", True),
        (".cat", "cat", False),
        ("cat!", "cat", False),
        ("cat ", "cat", False),
        (" cat", "cat", False),
        ("cat. ", "cat", False),
        ("cat .", "cat", False),
        ("a cat", "cat", False),
        ("cats", "cat", False),
        ("yes, it is", "yes", False),
        ("Yes", "yes", True),
        ("yes", "Yes", False),  # the label stays as it is
        ("two", "2", False),
        ("", "cat", False),
        (".", "", True),
        ("T-shirt", "t-shirt", True),
        ("ÉCLAIR", "éclair", True),
    ],
)
def test_gqa_answers(text: str, label: str, is_right: bool) -> None:
    assert (converted(text) == label) is is_right
    found = scored("gqa", [{"id": 1, "label": label}], {1: text})
    assert found.numbers == {"accuracy": 100.0 * is_right}


def test_gqa_types() -> None:
    """Open questions are those of the structural type "query"; unbalanced ones are left out."""
    references = [
        {"id": "a", "answer": "yes", "types": {"structural": "verify", "semantic": "obj"}},
        {"id": "b", "answer": "red", "types": {"structural": "query", "semantic": "attr"}},
        {"id": "c", "answer": "cat", "types": {"structural": "query", "semantic": "cat"}, "isBalanced": True},
        {"id": "d", "answer": "x", "types": {"structural": "choose", "semantic": "cat"}, "isBalanced": False},
    ]
    found = scored("gqa", references, {"a": "Yes.", "b": "blue", "c": "cat", "d": "x"}).as_dict()
    assert found["accuracy"] == pytest.approx(200 / 3)
    assert (found["binary"], found["open"]) == (100.0, 50.0)
    assert (found["n"], found["unknown"]) == (3, 1)
    assert found["by_structural_type"]["query"] == {"accuracy": 50.0, "n": 2}
    assert set(found["by_semantic_type"]) == {"obj", "attr", "cat"}


def test_gqa_unanswered_is_wrong_and_one_answer_is_a_label() -> None:
    references = [{"id": 1, "answers": ["cat"]}, {"id": 2, "label": "cat"}]
    found = scored("gqa", references, {1: "cat"})
    assert found.numbers == {"accuracy": 50.0} and found.counts["unanswered"] == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"id": 1, "answers": ["cat", "dog"]}, 'has no "label"'),
        ({"id": 1, "label": 3}, "the label is 3; give text"),
        ({"id": 1, "label": "cat", "types": "query"}, '"types" is no object'),
        ({"id": 1, "label": "cat", "types": {"structural": 1}}, '"types" is no object'),
    ],
)
def test_gqa_bad_references(reference: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored("gqa", [reference], {1: "cat"})
