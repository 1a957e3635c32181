"""Questions, prediction files and scores, with a stand-in that answers from a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamm.data.questions import read_questions
from megamm.data.templates import Turn
from megamm.errors import InputError
from megamm.evaluation import Settings, exact_match, report, score
from megamm.evaluation.evaluate import answered, check_same_model, evaluate, write_rows
from megamm.recipe import recipe_from_dict


class Oracle:
    """Answers with the number of images it was shown; remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[list[Turn]]] = []

    def generate(
        self, conversations: list[list[Turn]], images: list[list[Path]], max_new_tokens: int
    ) -> list[str]:
        assert len(conversations) == len(images) and max_new_tokens == 7
        self.batches.append(conversations)
        return [f" {len(shown)}\n" for shown in images]


def entry(key: str, images: list[str], *turns: str, **extra: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    conversation = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    return {"id": key, "image": images, "conversations": conversation, **extra}


ENTRIES = [
    entry("one", ["a.png"], "<image>\nHow many?", "1", kind="count"),
    entry("two", ["a.png", "b.png"], "<image><image>\nHow many?", "2", kind="count"),
    entry("none", [], "How many?", "5", kind="text"),
    entry("many", ["a.png", "b.png"], "<image>\nNow?", "1", "And now <image>?", "3"),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "b.png").write_bytes(b"b")
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def test_rows_and_score(data: Path) -> None:
    oracle, out = Oracle(), data.parent / "new" / "predictions.jsonl"
    questions = read_questions([data], None)
    rows = write_rows(out, answered(oracle, questions, Settings(batch_size=2, max_new_tokens=7)))
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert rows[0] == {
        "id": "one",
        "prediction": "1",
        "question": "<image>\nHow many?",
        "answer": "1",
        "correct": True,
        "kind": "count",
    }
    assert [(r["id"], r["correct"]) for r in rows] == [
        ("one", True),
        ("two", True),
        ("none", False),
        ("many#1", True),
        ("many#2", False),
    ]
    assert [len(batch) for batch in oracle.batches] == [2, 2, 1]
    result = score(rows)
    assert report(result) == ("accuracy: 0.6000 (n=5)\n  count: 1.0000 (n=2)\n  text: 0.0000 (n=1)")
    assert result.as_dict()["kinds"]["count"] == {"accuracy": 1.0, "correct": 2, "n": 2}


def test_history_holds_true_answers_and_images_seen_so_far(data: Path) -> None:
    questions = {q.id: q for q in read_questions([data], None)}
    root = data.parent
    assert questions["many#1"].turns == [Turn("user", "<image>\nNow?")]
    assert questions["many#1"].images == [root / "a.png"]
    second = questions["many#2"]
    assert second.turns == [
        Turn("user", "<image>\nNow?"),
        Turn("assistant", "1"),
        Turn("user", "And now <image>?"),
    ]
    assert second.images == [root / "a.png", root / "b.png"]
    assert second.answer == "3" and second.kind is None


def test_image_folder(data: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / name).rename(moved / name)
    with pytest.raises(InputError, match=r"a\.png: no such picture \(and 1 more are missing\).*--images"):
        read_questions([data], None)
    assert len(read_questions([data], moved)) == 5


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([ENTRIES[0], ENTRIES[0]], "'one' stands twice"),
        ([ENTRIES[0] | {"kind": 3}], '"kind" is 3'),
        ([entry("x", [], "<image>?", "1")], "1 <image> placeholders and 0 images"),
        ([], "no entries"),
    ],
)
def test_bad_data(data: Path, entries: list[dict[str, Any]], message: str) -> None:
    data.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message):
        read_questions([data], None)


def test_failure_leaves_no_predictions(data: Path) -> None:
    class Failing(Oracle):
        def generate(self, *args: Any, **kwargs: Any) -> list[str]:
            if self.batches:
                raise RuntimeError("out of memory")
            return super().generate(*args, **kwargs)

    out = data.parent / "predictions.jsonl"
    rows = answered(Failing(), read_questions([data], None), Settings(batch_size=2, max_new_tokens=7))
    with pytest.raises(RuntimeError):
        write_rows(out, rows)
    assert not out.exists()


def test_exact_match() -> None:
    assert exact_match(" seven\n", "seven")
    assert not exact_match("Seven", "seven")
    assert not exact_match("seven.", "seven")


def test_empty_score() -> None:
    assert report(score([])) == "accuracy: 0.0000 (n=0)"


RAW: dict[str, Any] = {
    "name": "n",
    "run_dir": "r",
    "tokenizer": "t",
    "model": {"language": {"preset": "tiny-llama", "num_layers": 4}, "vision": {"preset": "tiny-vit"}},
    "data": {"sequence_length": 128},
}


def test_another_model_is_refused() -> None:
    model = recipe_from_dict(RAW).model
    std = model.language.init_std / 2
    same = recipe_from_dict(RAW, overrides=[f"model.language.init_std={std}", "training.steps=3"]).model
    check_same_model(model, same, Path("ckpt"))
    other = recipe_from_dict(RAW, overrides=["model.language.num_layers=2"]).model
    with pytest.raises(
        InputError, match=r"ckpt: holds another model.*model\.language\.num_layers is 4 and 2"
    ):
        check_same_model(model, other, Path("ckpt"))


def test_wrong_task_and_missing_checkpoint(data: Path, tmp_path: Path) -> None:
    recipe = recipe_from_dict(RAW)
    with pytest.raises(InputError, match="is not a task"):
        evaluate(recipe, tmp_path, "exact", [data], tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="no checkpoint here"):
        evaluate(recipe, tmp_path / "none", "exact_match", [data], tmp_path / "out.jsonl")


def test_a_seed_of_the_recipe_is_no_option_of_benchmarks() -> None:
    """The quick start says `--seed=N` of everything."""
    from megamm.cli.entry import build_parser
    from megamm.cli.evaluate import _refuse_options_of_benchmarks

    words = ["evaluate", "r.yaml", "--checkpoint", "c", "--task", "exact_match", "--data", "d", "--out", "o"]
    _refuse_options_of_benchmarks(build_parser().parse_args([*words, "--seed=1"]))
    with pytest.raises(InputError, match="--limit: is for the benchmarks"):
        _refuse_options_of_benchmarks(build_parser().parse_args([*words, "--limit", "3"]))
