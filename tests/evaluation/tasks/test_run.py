"""A benchmark from its folder to its score, with a model that answers from its prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.scores import read_rows, score_rows
from megamm.evaluation.tasks import TASKS, TaskSettings
from megamm.evaluation.tasks.asking import plan_batches
from megamm.evaluation.tasks.prompts import load_prompts
from megamm.evaluation.tasks.run import prepare
from megamm.evaluation.tasks.scoring import missing_for_score, official, references_path, rehearse
from megamm.evaluation.tasks.settings import decoding_of
from megamm.inference import Decoding
from tests.evaluation.tasks import layouts
from tests.evaluation.tasks.stand_in import StandIn, always, evaluated, recipe

NOT_CAPTIONS = [name for name, task in TASKS.items() if task.metric != "caption"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def knowing(prompt: str, numbers: list[int], decoding: Decoding) -> str:
    """Right about every question of the layouts but a few."""
    known = {
        "How many": "2.",
        "brand": "Nous",
        "What is this": "basil",
        "overcast": "No",
        "on the left": "fences",
        "bear": "Yes, there is.",
        "cup": "There is no cup",
        "an artwork": "Yes",
        "a photo": "yes" if numbers == [2] else "no",
        'Who is "he"': "B" if "B. Bob" in prompt else "A. Bob",
        "A. up": "C",
        "A. right": "B",
        "burns": "B",
        "floats": "The answer is A.",
        "Compare": "(B)",
        "painted": "I say C",
        "How long": "It is 12",
    }
    return next((answer for words, answer in known.items() if words in prompt), "a photo of a house")


EXPECTED: dict[str, dict[str, float]] = {
    "vqav2": {"accuracy": 100.0},
    "okvqa": {"accuracy": 100.0},
    "textvqa": {"accuracy": 100.0},
    "vizwiz": {"accuracy": 100.0},
    "gqa": {"accuracy": 50.0},
    "pope": {"accuracy": 100.0, "f1": 100.0, "yes_ratio": 50.0},
    "mme": {"perception": 200.0, "cognition": 50.0},
    "mmbench": {"accuracy": 50.0},
    "scienceqa_img": {"accuracy": 50.0},
    "mmmu": {"accuracy": 200 / 3},
}


@pytest.mark.parametrize("task", NOT_CAPTIONS)
def test_predictions_references_and_score(task: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    result = evaluated(StandIn(knowing), task, layouts.FOLDERS[task](tmp_path), out)
    found = result.as_dict()
    assert {name: found[name] for name in EXPECTED[task]} == pytest.approx(EXPECTED[task])
    again = score_rows(TASKS[task].metric, read_rows(out), read_rows(references_path(out))).as_dict()
    assert again == {key: value for key, value in found.items() if key not in ("task", "rows", "not_asked")}
    assert [row["id"] for row in rows_of(out)] == [row["id"] for row in rows_of(references_path(out))]
    assert found["rows"] == found["n"] == len(rows_of(out)) and found["not_asked"] == 0
    assert result.report().startswith(f"{TASKS[task].metric}: {found['n']} questions")
    assert not list(out.parent.glob("*.partial*"))


@pytest.mark.parametrize("task", [name for name in TASKS if name not in NOT_CAPTIONS])
def test_captions_are_written_in_the_order_of_the_pictures(task: str, tmp_path: Path) -> None:
    """Scored by a stand-in: the real metrics need Java (tests/evaluation/scores)."""
    data, out = layouts.FOLDERS[task](tmp_path), tmp_path / "out.jsonl"
    seen: list[tuple[list[Any], list[Any]]] = []

    def scorer(metric: str, predictions: Any, references: Any, rule: str) -> Any:
        assert metric == "caption"
        seen.append(([row["prediction"] for row in predictions], [row["references"] for row in references]))
        return score_rows("gqa", [{"id": 1, "prediction": "a"}], [{"id": 1, "label": "a"}])

    examination = prepare(recipe(), task, [data], out, TaskSettings(batch_size=1))
    model = StandIn(lambda prompt, numbers, decoding: f" picture {numbers[0]}\n")
    result = examination.take(model, scorer)
    assert result is not None and result.num_questions == 2
    ((predictions, references),) = seen
    assert predictions == (["picture 1", "picture 4"] if task == "flickr30k" else ["picture 1", "picture 2"])
    assert [row["references"] for row in rows_of(references_path(out))] == references


def test_questions_without_answers_have_no_score(tmp_path: Path) -> None:
    path = layouts.put(
        tmp_path / "q.json", [{"image": f"VizWiz_test_{n}.jpg", "question": "?"} for n in "12"]
    )
    for n in "12":
        layouts.put(tmp_path / "test" / f"VizWiz_test_{n}.jpg", layouts.picture(int(n)))
    out = tmp_path / "out.jsonl"
    result = evaluated(always("x"), "vizwiz", path, out)
    assert "there is no score" in result.report() and "accuracy" not in result.as_dict()
    assert not references_path(out).exists() and len(rows_of(out)) == 2


def test_some_answers_are_enough_for_a_score(tmp_path: Path) -> None:
    root = layouts.gqa(tmp_path)
    path = root / "questions1.2" / "testdev_balanced_questions.json"
    questions = json.loads(path.read_text())
    del questions["201640614"]["answer"]
    layouts.put(path, questions)
    result = evaluated(always("No."), "gqa", root, tmp_path / "out.jsonl")
    assert result.as_dict()["accuracy"] == 100.0 and result.as_dict()["n"] == 1
    assert result.report().startswith("gqa: 2 questions, 1 with known answers\n")
    assert len(rows_of(tmp_path / "out.jsonl")) == 2


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda p: p.write_bytes(p.read_bytes()[:150]), lambda p: p.write_bytes(b"")]
)
def test_unreadable_pictures_are_counted_and_answered_with_nothing(
    damage: Callable[[Path], Any], tmp_path: Path
) -> None:
    root = layouts.vqa(tmp_path)
    damage(root / "val2014" / "COCO_val2014_000000000001.jpg")
    model, out = always("2"), tmp_path / "out.jsonl"
    result = evaluated(model, "vqav2", root, out)
    assert [row["prediction"] for row in rows_of(out)] == ["2", "", "2"]
    assert "COCO_" in rows_of(out)[1]["problem"]
    assert result.not_asked == [1] and result.as_dict()["accuracy"] == pytest.approx(200 / 3)
    assert '1 could not be asked and have the answer ""' in result.report()
    assert len(model.asked) == 2


def test_a_question_that_is_too_long_is_left_out_alone(tmp_path: Path) -> None:
    root = layouts.vizwiz(tmp_path)
    path = root / "Annotations" / "val.json"
    entries = json.loads(path.read_text())
    entries[0]["question"] = "What " * 100
    layouts.put(path, entries)
    extra = entries[1] | {"image": "VizWiz_val_00000002.jpg"}
    layouts.put(path, [*entries, extra])
    layouts.put(root / "val" / extra["image"], layouts.picture(3))
    model = StandIn(lambda *_: "basil", longest=300)
    result = evaluated(model, "vizwiz", root, tmp_path / "out.jsonl")
    assert result.not_asked == [1] and "shorten the prompt" in result.first_problem
    assert [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")] == ["", "basil", "basil"]


def test_a_model_that_takes_no_question_is_an_error(tmp_path: Path) -> None:
    model = StandIn(lambda *_: "basil", longest=3)
    with pytest.raises(InputError, match="shorten the prompt"):
        evaluated(model, "vizwiz", layouts.vizwiz(tmp_path), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_all_pictures_missing_is_an_error(tmp_path: Path) -> None:
    root = layouts.gqa(tmp_path)
    (root / "images" / "n161313.jpg").unlink()
    with pytest.raises(InputError, match=r"n161313\.jpg: no such picture, nor any other of gqa; .*--images"):
        evaluated(always("x"), "gqa", root, tmp_path / "out.jsonl")


def test_decoding_of_prompts_and_options(tmp_path: Path) -> None:
    root = layouts.vizwiz(tmp_path)
    model = always("x")
    evaluated(model, "vizwiz", root, tmp_path / "a.jsonl")
    assert model.asked[0][2] == Decoding(max_new_tokens=64, beams=5, temperature=0.2)
    chosen = {"beams": 1, "max_new_tokens": 9, "top_p": None, "sample": True}
    settings = TaskSettings(seed=4, decoding=chosen)
    evaluated(model, "vizwiz", root, tmp_path / "b.jsonl", settings)
    assert model.asked[2][2] == Decoding(max_new_tokens=9, temperature=0.2, sample=True, seed=4)
    evaluated(model, "vizwiz", root, tmp_path / "c.jsonl", of=recipe("xcomposer"))
    assert model.asked[4][2] == Decoding(max_new_tokens=64, beams=5, repetition_penalty=1.5)


@pytest.mark.parametrize(
    ("given", "sample", "temperature"),
    [
        ({}, False, 0.2),
        ({"sample": True}, True, 0.2),
        ({"temperature": 0.7}, False, 0.7),  # of five beams it changes nothing
        ({"temperature": 0.7, "beams": 1}, True, 0.7),
        ({"top_p": 0.5, "beams": 1, "sample": False}, True, 0.2),
        ({"temperature": 0, "sample": True}, False, 1.0),
    ],
)
def test_what_is_drawn(given: dict[str, Any], sample: bool, temperature: float) -> None:
    decoding = decoding_of(load_prompts()["llava"], "vqa", TASKS["gqa"], TaskSettings(decoding=given), 0)
    assert (decoding.sample, decoding.temperature) == (sample, temperature)


def test_stops_of_the_words_stay() -> None:
    settings = TaskSettings(decoding={"stop": ["."]})
    decoding = decoding_of(load_prompts()["open_flamingo"], "vqa", TASKS["gqa"], settings, 2)
    assert decoding.stop == ("<|endofchunk|>", ".") and decoding.seed == 2


def test_several_runs_have_mean_and_deviation(tmp_path: Path) -> None:
    seeds: dict[int, str] = {}

    def drawn(prompt: str, numbers: list[int], decoding: Decoding) -> str:
        return seeds.setdefault(decoding.seed, "no" if len(seeds) % 2 else "fence")

    settings = TaskSettings(runs=2, seed=3, decoding={"sample": True})
    result = evaluated(StandIn(drawn), "gqa", layouts.gqa(tmp_path), tmp_path / "p.jsonl", settings)
    found = result.as_dict()
    assert [row["prediction"] for row in rows_of(tmp_path / "p.run0.jsonl")] == ["fence"] * 2
    assert [row["prediction"] for row in rows_of(tmp_path / "p.run1.jsonl")] == ["no"] * 2
    assert len(seeds) == 2 and found["accuracy"] == 50.0 and found["std"]["accuracy"] == 0.0
    assert [run["accuracy"] for run in found["runs"]] == [50.0, 50.0] and found["not_asked"] == [0, 0]
    assert "std" in result.report() and not (tmp_path / "p.jsonl").exists()


def test_batches_hold_questions_of_one_size(tmp_path: Path) -> None:
    root = layouts.vqa(tmp_path, count=9)
    path = root / "v2_OpenEnded_mscoco_val2014_questions.json"
    questions = json.loads(path.read_text())
    for number, entry in enumerate(questions["questions"]):
        entry["question"] = "What" + " indeed" * (number * 7 % 9)
    layouts.put(path, questions)
    model = StandIn(lambda prompt, numbers, decoding: f"of {numbers[0]}")
    evaluated(model, "vqav2", root, tmp_path / "out.jsonl", TaskSettings(batch_size=3))
    lengths = [len(prompt) for prompt, _, _ in model.asked]
    assert model.batches == [3, 3, 3]
    parts = [lengths[:3], lengths[6:], lengths[3:6]]
    assert parts[0] + parts[1] + parts[2] == sorted(lengths), "smallest first, then from the largest down"
    assert [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")] == [f"of {n}" for n in range(9)]


def test_kinds_with_different_decoding_share_no_batch(tmp_path: Path) -> None:
    examination = prepare(recipe(), "mmmu", [layouts.mmmu_parquet(tmp_path)], tmp_path / "o", TaskSettings())
    exam = examination._exam(0)
    assert {exam.decoding[index].max_new_tokens for index in (0, 1, 2)} == {128}
    changed = [*exam.decoding[:2], Decoding(beams=2)]
    batches = plan_batches(type(exam)(**{**vars(exam), "decoding": changed}), 8)
    assert sorted(map(sorted, batches)) == [[0, 1], [2]]


@pytest.mark.parametrize(("template", "task"), [("plain", "vqav2"), ("interleaved", "coco_caption")])
def test_templates_without_room_for_questions(template: str, task: str, tmp_path: Path) -> None:
    data = layouts.FOLDERS[task](tmp_path)
    settings = TaskSettings(prompts="llava")
    with pytest.raises(InputError, match=f"template: the recipe's {template} takes"):
        evaluated(always("x"), task, data, tmp_path / "o", settings, recipe(template))


def test_captions_of_a_stage_that_learns_captions(tmp_path: Path) -> None:
    data, model = layouts.coco_caption(tmp_path), always("x")
    examination = prepare(recipe("plain"), "coco_caption", [data], tmp_path / "o.jsonl", TaskSettings())
    some = score_rows("gqa", [{"id": 1, "prediction": "a"}], [{"id": 1, "label": "a"}])
    examination.take(model, lambda *_: some)
    assert {prompt for prompt, _, _ in model.asked} == {"<image>"}


def test_what_is_wrong_with_references_is_known_before_the_first_question(tmp_path: Path) -> None:
    model = always("yes")
    with pytest.raises(InputError, match="where MME asks 2"):
        evaluated(model, "mme", layouts.mme(tmp_path), tmp_path / "o.jsonl", TaskSettings(limit=3))
    assert not model.asked
    rehearse(official, TASKS["mme"], [], "always")


def test_captions_need_programs_that_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "1", "references": ["a"]}]
    monkeypatch.setenv("PATH", "")
    assert "captions are written and not scored" in missing_for_score(TASKS["nocaps"], rows)
    assert missing_for_score(TASKS["nocaps"], []) == missing_for_score(TASKS["gqa"], rows) == ""


def test_a_score_that_fails_leaves_the_predictions(tmp_path: Path) -> None:
    calls: list[str] = []

    def failing(metric: str, *_: Any) -> Any:
        calls.append(metric)
        if len(calls) > 1:
            raise InputError("java: is missing; install it")
        return None

    out = tmp_path / "o.jsonl"
    examination = prepare(recipe(), "gqa", [layouts.gqa(tmp_path)], out, TaskSettings())
    with pytest.raises(
        InputError, match=r"java: is missing.*the answers stand in .*o\.jsonl; score them with"
    ):
        examination.take(always("x"), failing)
    assert len(rows_of(out)) == 2


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--task: vqav3 is not a task; use exact_match, coco_caption"):
        evaluated(always("x"), "vqav3", tmp_path, tmp_path / "o")
