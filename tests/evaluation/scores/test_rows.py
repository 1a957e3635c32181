"""Files of rows in all their layouts, what is wrong with some, and which prediction belongs where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.scores import read_rows, score_rows
from megamm.evaluation.scores.pairing import paired


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.json"


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"id": 1, "prediction": "a"}\n\n{"id": "2", "prediction": "é"}\n', None),
        ('\ufeff{"id": 1, "prediction": "a"}\n{"id": "2", "prediction": "é"}', None),
        ('[{"id": 1, "prediction": "a"}, {"id": "2", "prediction": "é"}]', None),
        ('\n [\n{"id": 1,\n"prediction": "a"}\n, {"id": "2", "prediction": "é"}]\n', None),
        ('{"id": 1, "prediction": "a"}', [{"id": 1, "prediction": "a"}]),
        ('{"info": {}, "annotations": [{"image_id": 1, "caption": "a"}]}', [{"image_id": 1, "caption": "a"}]),
        ('{\n"annotations": [\n{"image_id": 1, "caption": "a"}\n]}', [{"image_id": 1, "caption": "a"}]),
        ('{"q1": "A", "q2": "B"}', [{"id": "q1", "prediction": "A"}, {"id": "q2", "prediction": "B"}]),
        ('{"prediction": "a"}', [{"prediction": "a"}]),
        ('{\n"07": {"answer": "yes", "types": {}}\n}', [{"id": "07", "answer": "yes", "types": {}}]),
        ('{"q1": "A",\n"q2": "B"}', [{"id": "q1", "prediction": "A"}, {"id": "q2", "prediction": "B"}]),
        ('{"question_id": 3, "text": "a"}\n', [{"question_id": 3, "text": "a"}]),
        (
            '{"id": 1, "answers": [{"answer": "a", "answer_id": 1}, {"answer": "b"}]}\n',
            [{"id": 1, "answers": ["a", "b"]}],
        ),
    ],
)
def test_layouts(file: Path, text: str, rows: list[Any] | None) -> None:
    found = read_rows(written(file, text))
    expected = rows or [{"id": 1, "prediction": "a"}, {"id": "2", "prediction": "é"}]
    assert found == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no rows"),
        ("\n \n", "holds no rows"),
        ("[]", "holds no rows"),
        ("id,prediction\n1,a\n", "begins with 'i', which is no JSON"),
        ('{"id": 1}\n{"id": 2,}\n', "line 2, column"),
        ('{"id": 1\n{"id": 2}\n', "line 2, column"),
        ('{"id": 1}\n[2]\n', "line 2: is no JSON object"),
        ('{"id": 1}\n3\n', "line 2: is no JSON object"),
        ('[{"id": 1}, 2]', "entry 2: is no JSON object"),
        ('[{"id": 1}, {"id": 2}', "expected ',' or ']'"),
        ('{"a": 1}', "entry 1: is no JSON object"),
        ('{"annotations": {}}', '"annotations" is no list'),
        ('{"id": 1, "prediction": "\x00"}\n', "line 1, column"),
    ],
)
def test_what_is_no_file_of_rows(file: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        read_rows(written(file, text))
    assert message in str(error.value) and str(error.value).startswith(str(file))
    assert "\n" not in str(error.value) and "; " in str(error.value)


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"id": 1, "prediction": "\xe9"}')
    with pytest.raises(InputError, match="is not UTF-8"):
        read_rows(tmp_path / "latin.json")
    (tmp_path / "deep.json").write_text('{"id": 1, "a": ' + "[" * 100_000)
    with pytest.raises(InputError, match="line 1"):
        read_rows(tmp_path / "deep.json")


LABELS = [{"id": 1, "label": "cat"}, {"id": "2", "label": "dog"}]


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        ([{"prediction": "a"}], 'row 1: has no "id"'),
        ([{"id": None, "prediction": "a"}], '"id" is None; give a whole number or text'),
        ([{"id": 1.0, "prediction": "a"}], '"id" is 1.0'),
        ([{"id": True, "prediction": "a"}], '"id" is True'),
        ([{"id": [1], "prediction": "a"}], r'"id" is \[1\]'),
        ([{"id": 1}], 'row 1: has no "prediction"'),
        ([{"id": 1, "prediction": None}], '"prediction" is None; give text'),
        ([{"id": 1, "prediction": 3}], '"prediction" is 3; give text'),
        ([{"id": 1, "prediction": ["x" * 99]}], r"\.\.\.; give text"),
        ([{"id": 1, "prediction": "a"}, {"id": "1", "prediction": "b"}], "row 2: the id '1' stands in row 1"),
        ([{"id": 3, "prediction": "a"}], "no reference has the id '3'"),
        ([], "predictions: there are none"),
        (["a"], "row 1: is no mapping"),
    ],
)
def test_bad_predictions(predictions: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_rows("gqa", predictions, LABELS)


def test_bad_references_and_metric() -> None:
    prediction = {"id": 1, "prediction": "a"}
    with pytest.raises(InputError, match="references: there are none"):
        score_rows("gqa", [prediction], [])
    with pytest.raises(InputError, match="references: row 3: the id '2' stands in row 2 already"):
        score_rows("gqa", [prediction], [*LABELS, {"id": 2, "label": "x"}])
    with pytest.raises(InputError, match="'bleu' is unknown; use vqa, gqa"):
        score_rows("bleu", [prediction], LABELS)


def test_rows_of_files_name_file_and_line(file: Path, tmp_path: Path) -> None:
    first = read_rows(written(file, '{"id": 1, "prediction": "a"}\n\n{"id": 1, "prediction": "b"}\n'))
    with pytest.raises(InputError) as error:
        score_rows("gqa", first, LABELS)
    assert str(error.value).startswith(f"{file}: line 3: the id '1' stands in line 1 already;")
    labels = read_rows(written(tmp_path / "labels.json", '[{"id": 1}]'))
    with pytest.raises(InputError, match=r"labels\.json: entry 1: has no \"label\""):
        score_rows("gqa", read_rows(written(file, '{"id": 1, "prediction": "a"}')), labels)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 1, "question_id": 5, "prediction": "a"}, "1"),
        ({"question_id": 5, "answer": "a"}, "5"),
        ({"questionId": "05", "prediction": "a"}, "05"),
        ({"image_id": 7, "caption": "a"}, "7"),
        ({"id": 99, "image_id": 7, "caption": "a"}, "7"),  # 99 is the caption's
        ({"index": 8, "prediction": "a"}, "8"),
        ({"image": "x.jpg", "answer": "a"}, "x.jpg"),
        ({"id": -1, "text": "a"}, "-1"),
    ],
)
def test_ids_and_texts_under_other_names(row: dict[str, Any], expected: str) -> None:
    pairs = paired([row], [{"id": expected, "label": "a"}], strict=True)
    assert [(question.id, question.prediction) for question in pairs.questions] == [(expected, "a")]


def test_prediction_comes_before_answer() -> None:
    """Rows of `megamm evaluate` hold the right answer, too."""
    pairs = paired([{"id": 1, "prediction": "a", "answer": "b"}], [{"id": 1}], strict=True)
    assert pairs.questions[0].prediction == "a"


def test_order_and_counts() -> None:
    predictions = [{"id": 9, "prediction": "x"}, {"id": "2", "prediction": "b"}, {"id": 1, "prediction": "a"}]
    pairs = paired(iter(predictions), iter([{"id": "1"}, {"id": 2}, {"id": 3}]), strict=False)
    assert [(q.id, q.prediction) for q in pairs.questions] == [("1", "a"), ("2", "b"), ("3", None)]
    assert pairs.counts == {"n": 3, "unanswered": 1, "unknown": 1}


def test_many_rows(tmp_path: Path) -> None:
    """Of the size of 20 thousand; what is done for each row does not grow with their number."""
    rows = [{"id": n, "prediction": "Yes."} for n in range(20_000)]
    labels = [{"id": str(n), "label": "yes"} for n in reversed(range(20_000))]
    for name, content in (("p.jsonl", rows), ("r.jsonl", labels)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, content)))
    found = score_rows("gqa", read_rows(tmp_path / "p.jsonl"), read_rows(tmp_path / "r.jsonl"))
    assert found.numbers == {"accuracy": 100.0} and found.counts["n"] == 20_000
