"""The files for official servers, as these take them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.scores import score_rows
from megamm.evaluation.tasks import TASKS, TaskSettings
from megamm.evaluation.tasks.run import prepare
from tests.evaluation.tasks import layouts
from tests.evaluation.tasks.stand_in import StandIn, evaluated, recipe

ANSWER = " Two Dogs. "


def submitted(task: str, tmp_path: Path, answer: str = ANSWER) -> Path:
    """The file that is written for a model with one answer."""
    place = tmp_path / "made" / "submission"
    settings = TaskSettings(submission=place)
    data = layouts.FOLDERS[task](tmp_path / "data")
    examination = prepare(recipe(), task, [data], tmp_path / "out.jsonl", settings)
    some = score_rows("gqa", [{"id": 1, "prediction": "a"}], [{"id": 1, "label": "a"}])
    model = StandIn(lambda *_: answer)
    examination.take(model, lambda *_: some)
    return place


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("coco_caption", [{"image_id": n, "caption": "Two Dogs."} for n in (42, 73)]),
        ("nocaps", [{"image_id": n, "caption": "Two Dogs."} for n in (0, 1)]),
        ("flickr30k", [{"image_id": n, "caption": "Two Dogs."} for n in (1001, 1004)]),
        ("vqav2", [{"question_id": n, "answer": "Two Dogs."} for n in (1000, 1001, 1002)]),
        ("okvqa", [{"question_id": n, "answer": "Two Dogs."} for n in (1000, 1001, 1002)]),
        ("textvqa", [{"question_id": n, "answer": "Two Dogs."} for n in (34602, 34603)]),
        ("vizwiz", [{"image": f"VizWiz_val_0000000{n}.jpg", "answer": "Two Dogs."} for n in (0, 1)]),
        ("gqa", [{"questionId": n, "prediction": "two dogs"} for n in ("201307251", "201640614")]),
        ("mmmu", {f"validation_{n}": "Two Dogs." for n in ("Art_1", "Art_2", "Math_1")}),
    ],
)
def test_json(task: str, content: Any, tmp_path: Path) -> None:
    assert json.loads(submitted(task, tmp_path).read_text()) == content


@pytest.mark.parametrize(
    ("answer", "first", "second"),
    [
        ("B", "B", "B"),
        ("(A) like", "A", "A"),
        ("C. it", "C. it", "C"),
        ("Before", "Before", "Before"),
        ("", "", ""),
    ],
)
def test_letters_of_mmmu(answer: str, first: str, second: str, tmp_path: Path) -> None:
    found = json.loads(submitted("mmmu", tmp_path, answer).read_text())
    assert found["validation_Art_1"] == first and found["validation_Art_2"] == second
    assert found["validation_Math_1"] == answer


def test_mmbench(tmp_path: Path) -> None:
    with open(submitted("mmbench", tmp_path, "B"), newline="") as file:
        head, *rows = csv.reader(file, delimiter="\t")
    assert head == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[0] == ["7", 'Who is "he"?', "Ann", "Bob", "", "", "B", "B", "dev"]
    assert rows[2][:2] == ["9", "Which\nword?"] and len(rows) == 4


def test_mme(tmp_path: Path) -> None:
    folder = submitted("mme", tmp_path, "Yes,\tit is\n")
    assert sorted(path.name for path in folder.iterdir()) == ["artwork.txt", "code_reasoning.txt"]
    assert (folder / "artwork.txt").read_text() == (
        "10002\tIs this an artwork? Please answer yes or no.\tYes\tYes, it is\n"
        "10002\tIs this a photo? Please answer yes or no.\tNo\tYes, it is\n"
    )


def test_each_run_has_its_file(tmp_path: Path) -> None:
    place = tmp_path / "sub.json"
    settings = TaskSettings(submission=place, runs=2)
    evaluated(StandIn(lambda *_: "x"), "gqa", layouts.gqa(tmp_path), tmp_path / "out.jsonl", settings)
    assert len(json.loads((tmp_path / "sub.run1.json").read_text())) == 2 and not place.exists()


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if not task.submission])
def test_benchmarks_without_a_server(task: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"--submission: no server takes answers to {task}"):
        submitted(task, tmp_path)


@pytest.mark.parametrize(("task", "make"), [("gqa", Path.mkdir), ("mme", Path.touch)])
def test_wrong_places(task: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    make(tmp_path / "made" / "submission")
    with pytest.raises(InputError, match=r"is a folder; |is a file; "):
        submitted(task, tmp_path)
