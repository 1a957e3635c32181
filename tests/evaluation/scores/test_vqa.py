"""VQA accuracy: every rule of the normaliser, the leave-one-out mean, and both rules of normalising.

Expected values were worked out by hand from VQA's vqaEval.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.errors import InputError
from megamm.evaluation.scores import Scores, score_rows
from megamm.evaluation.scores.vqa import agreement
from megamm.evaluation.scores.vqa_text import CONTRACTIONS, MARKS, normalised, punctuation


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # white space
        ("  red  car ", "red car"),
        ("red\ncar\tpark", "red car park"),
        ("red\u00a0car", "red car"),
        # marks become spaces where none of their kind stands beside a space ...
        ("red-and-white", "red and white"),
        ("either/or", "either or"),
        ("[x]{y}(z)", "x y z"),
        ('"quoted"', "quoted"),
        ("a+b=c", "b c"),  # "a" is an article by then
        ("back\\slash_under", "back slash under"),
        ("<b>@`", "b"),
        ("why?because!", "why because"),
        # ... and go without a trace where one does
        ("red - white-ish", "red whiteish"),
        ("yes, no,maybe", "yes nomaybe"),
        ("really? or?not", "really ornot"),
        # a comma between digits lets all marks go without a trace
        ("1,000", "1000"),
        ("1,000-2", "10002"),
        ("3/4 of 1,000", "34 of 1000"),
        # the condition looks at the answer as it was: there is no " ," in it, although ";" is a space by then
        ("x;,y,z", "x y z"),
        # apostrophes, colons and other marks stay
        ("dog's: 5%", "dog's: 5%"),
        # full stops go, but before digits
        ("St. Mary.", "st mary"),
        ("3.5", "3.5"),
        (".5", ".5"),
        ("5.", "5"),
        ("v1.b.2", "v1b.2"),
        ("...", ""),
        # words
        ("Two dogs", "2 dogs"),
        ("None", "0"),
        ("zero one two three four five six seven eight nine ten eleven", "0 1 2 3 4 5 6 7 8 9 10 eleven"),
        ("The cat and a dog and an ox", "cat and dog and ox"),
        ("A", ""),
        ("there", "there"),
        ("dont", "don't"),
        ("DONT", "don't"),
        ("Im Ive Id've", "im ive id've"),  # capitals of the table are never met
        ("somebody'd", "somebodyd"),
        ("twas ow's'at", "'twas 'ow's'at"),
        ("y'all'dve", "y'all'd've"),
        ("it's", "it's"),
        ("", ""),
    ],
)
def test_normaliser(text: str, expected: str) -> None:
    assert normalised(text) == expected


def test_no_more_than_32_full_stops_go() -> None:
    assert punctuation("x." * 33) == "x" * 33 + "."


def test_contractions() -> None:
    """120 in the evaluator's table, of which four are written with capitals and can never be met."""
    assert len(CONTRACTIONS) == 116
    assert all(key == key.lower() for key in CONTRACTIONS)
    for wrong, right in CONTRACTIONS.items():
        assert wrong.replace("'", "") == right.replace("'", "")
        assert normalised(wrong) == right


@given(st.text(alphabet="ab1 .,;-?/'\n\t\u00e9", max_size=12))
def test_punctuation_as_its_definition_reads(text: str) -> None:
    """Mark by mark, for all marks, as it is defined: those that are not in the text change nothing."""
    expected = text
    for mark in MARKS:
        beside_space = mark + " " in text or " " + mark in text
        gone = beside_space or re.search(r"(\d)(\,)(\d)", text) is not None
        expected = expected.replace(mark, "" if gone else " ")
    assert punctuation(text) == re.sub(r"(?!<=\d)(\.)(?!\d)", "", expected, count=int(re.UNICODE))


@pytest.mark.parametrize(
    ("matches", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_leave_one_out_of_ten(matches: int, expected: float) -> None:
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert agreement("Cat.", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["cat"], 0.0),  # nobody else to agree with
        (["cat", "cat"], 1 / 3),
        (["cat", "dog"], 1 / 6),
        (["cat"] * 4, 1.0),
        (["cat"] * 3 + ["dog"] * 9, (3 * 2 / 3 + 9) / 12),
    ],
)
def test_other_numbers_of_answers(answers: list[str], expected: float) -> None:
    assert agreement("cat", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "always", "github"),
    [
        ("Yes", ["yes"] * 10, 1.0, 0.0),  # all equal: as it stands
        ("yes", ["yes"] * 10, 1.0, 1.0),
        ("yes.", ["yes"] * 10, 1.0, 0.0),
        ("two", ["2"] * 10, 1.0, 0.0),
        ("Two", ["Two"] * 10, 1.0, 1.0),
        ("yes\n", [" yes"] * 10, 1.0, 1.0),  # white space at the ends goes in any case
        ("Two", ["2"] * 9 + ["3"], 1.0, 1.0),  # not all equal: normalised
        ("a dog", ["dog"] * 5 + ["The dog"] * 5, 1.0, 1.0),
        ("a dog", ["dog"] * 10, 1.0, 0.0),
    ],
)
def test_rules(prediction: str, answers: list[str], always: float, github: float) -> None:
    assert agreement(prediction, answers, "always") == pytest.approx(always)
    assert agreement(prediction, answers, "github") == pytest.approx(github)


words = st.sampled_from(["cat", "Cat.", "a cat", "dog", "two", "2", "", "1,000"])


@given(words, st.lists(words, min_size=1, max_size=12), st.randoms(), st.sampled_from(["always", "github"]))
def test_order_of_answers_does_not_matter(
    prediction: str, answers: list[str], random: Any, rule: str
) -> None:
    shuffled = list(answers)
    random.shuffle(shuffled)
    value = agreement(prediction, answers, rule)
    assert 0.0 <= value <= 1.0
    assert agreement(prediction, shuffled, rule) == value


@given(words, st.lists(words, min_size=1, max_size=11), st.sampled_from(["always", "github"]))
def test_formula_is_the_mean_over_those_left_out(prediction: str, answers: list[str], rule: str) -> None:
    whole = rule == "always" or len({answer.strip() for answer in answers}) > 1
    people, said = [
        [normalised(t) if whole else t.strip() for t in given] for given in (answers, [prediction])
    ]
    means = []
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        means.append(min(1, others.count(said[0]) / 3))
    assert agreement(prediction, answers, rule) == pytest.approx(sum(means) / len(means))


def scored(references: list[dict[str, Any]], predictions: dict[Any, str], **options: str) -> Scores:
    rows = [{"id": key, "prediction": text} for key, text in predictions.items()]
    return score_rows("vqa", rows, references, **options)


def test_breakdown_and_unanswered() -> None:
    references = [
        {"id": 1, "answers": ["yes"] * 10, "answer_type": "yes/no"},
        {"id": 2, "answers": ["2"] * 10, "answer_type": "number"},
        {"id": 3, "answers": ["3"] * 10, "answer_type": "number"},
        {"id": 4, "answers": [{"answer": "red", "answer_id": n} for n in range(10)], "answer_type": "other"},
    ]
    found = scored(references, {1: "yes", 2: "two", "4": "Red"}).as_dict()
    assert found["accuracy"] == pytest.approx(75.0)
    assert (found["n"], found["unanswered"]) == (4, 1)
    assert found["by_answer_type"] == {
        "number": {"accuracy": 50.0, "n": 2},
        "other": {"accuracy": 100.0, "n": 1},
        "yes/no": {"accuracy": 100.0, "n": 1},
    }
    github = scored(references, {1: "yes", 2: "two", 3: "3", 4: "Red"}, vqa_rule="github")
    assert github.numbers == {"accuracy": pytest.approx(50.0)}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"id": 1}, r'references: row 1: has no "answers"'),
        ({"id": 1, "answers": []}, 'has no "answers"'),
        ({"id": 1, "answers": "yes"}, 'has no "answers"'),
        ({"id": 1, "answers": ["yes", None]}, '"answers" holds None'),
        ({"id": 1, "answers": [{"text": "yes"}]}, '"answers" holds None'),
    ],
)
def test_bad_references(reference: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scored([reference], {1: "yes"})


def test_unknown_ids_are_refused_and_so_is_an_unknown_rule() -> None:
    references = [{"id": 1, "answers": ["yes"]}]
    with pytest.raises(InputError, match=r"predictions: row 2: no reference has the id '2'"):
        scored(references, {1: "yes", 2: "no"})
    with pytest.raises(InputError, match="always or github"):
        scored(references, {1: "yes"}, vqa_rule="sometimes")
