"""Scores as data and as tables, of one run and of several."""

from __future__ import annotations

import pytest

from megamm.evaluation.scores import Runs, Scores, as_text


def run(accuracy: float, part: float, spice: float | None = None, unanswered: int = 0) -> Scores:
    return Scores(
        "vqa",
        {"accuracy": accuracy, "spice": spice},
        {"n": 3, "unanswered": unanswered, "unknown": 0},
        {"by_answer_type": {"number": {"accuracy": part, "n": 2}}},
        ("a note",),
    )


def test_as_dict() -> None:
    assert run(50.0, 25.0).as_dict() == {
        "metric": "vqa",
        "accuracy": 50.0,
        "spice": None,
        "n": 3,
        "unanswered": 0,
        "unknown": 0,
        "by_answer_type": {"number": {"accuracy": 25.0, "n": 2}},
        "notes": ["a note"],
    }


def test_table() -> None:
    assert as_text(run(200 / 3, 50.0, unanswered=2)).splitlines() == [
        "vqa: 3 questions (2 unanswered)",
        "accuracy  66.67",
        "spice         -",
        "",
        "by_answer_type  accuracy  n",
        "number             50.00  2",
        "",
        "note: a note",
    ]


def test_mean_and_sample_deviation_of_runs() -> None:
    runs = Runs([run(50.0, 10.0, 1.0), run(52.0, 20.0, 2.0, 1), run(57.0, 60.0, None)], ["a", "b", "c"])
    found = runs.as_dict()
    assert found["accuracy"] == pytest.approx(53.0)
    assert found["std"]["accuracy"] == pytest.approx((26 / 2) ** 0.5)  # 9 + 1 + 16, over n - 1
    assert found["by_answer_type"] == {"number": {"accuracy": pytest.approx(30.0), "n": 2}}
    assert found["std"]["by_answer_type"]["number"]["accuracy"] == pytest.approx((1400 / 2) ** 0.5)
    assert found["spice"] is None and found["std"]["spice"] is None
    assert (found["n"], found["unanswered"], found["num_runs"]) == (3, [0, 1, 0], 3)
    assert [one["predictions"] for one in found["runs"]] == ["a", "b", "c"]
    assert found["runs"][1] == {"predictions": "b", **run(52.0, 20.0, 2.0, 1).as_dict()}


def test_table_of_runs() -> None:
    assert Runs([run(50.0, 0.0), run(52.0, 0.0)], ["a.jsonl", "b.jsonl"]).as_text().splitlines() == [
        "run 1: a.jsonl",
        "run 2: b.jsonl",
        "           mean   std  run 1  run 2",
        "accuracy  51.00  1.41  50.00  52.00",
        "spice         -     -      -      -",
        "note: a note",
    ]
