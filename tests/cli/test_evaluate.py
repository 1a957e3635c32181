"""megamm evaluate on the command line: a benchmark with a stand-in for the model, and wrong options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamm.cli.entry import main
from megamm.evaluation.scores import read_rows, score_rows
from megamm.evaluation.tasks import TaskSettings, run
from megamm.recipe import load_recipe, recipe_to_yaml
from tests.evaluation.tasks import layouts
from tests.evaluation.tasks.stand_in import Killed, StandIn

RECIPE = Path(__file__).parents[2] / "examples" / "quickstart" / "llava.yaml"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """What is looked at before a checkpoint is loaded."""
    folder = tmp_path / "step_00000001"
    layouts.put(folder / "recipe.yaml", recipe_to_yaml(load_recipe(RECIPE, [])))
    layouts.put(folder / "manifest.json", "{}")
    return folder


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    found = StandIn(lambda prompt, numbers, decoding: f"No. {decoding.beams}")
    found.settings = None  # type: ignore[attr-defined]

    def load(checkpoint: Path, settings: TaskSettings) -> StandIn:
        found.settings = settings  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(run, "_load", load)
    return found


def line(checkpoint: Path, data: Path, out: Path, *more: str, task: str = "pope") -> list[str]:
    files = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out)]
    return ["evaluate", str(RECIPE), "--task", task, *files, *more]


def test_a_benchmark(
    checkpoint: Path, model: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pope.jsonl"
    options = ["--json", "--beams", "2", "--tensor", "2", "--limit", "4", "--batch-size", "2"]
    assert main(line(checkpoint, layouts.pope(tmp_path / "data"), out, *options)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["accuracy"] == 50.0 and printed["rows"] == 4 and printed["yes_ratio"] == 0.0
    again = score_rows("pope", read_rows(out), read_rows(tmp_path / "pope.references.jsonl")).as_dict()
    assert {key: printed[key] for key in again} == again
    settings: Any = model.settings  # type: ignore[attr-defined]
    assert (settings.tensor, settings.pipeline) == (2, 1)
    assert read_rows(out)[0]["prediction"] == "No. 2" and model.batches == [2, 2]


def test_the_table(
    checkpoint: Path, model: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line(checkpoint, layouts.gqa(tmp_path), tmp_path / "g.jsonl", task="gqa")) == 0
    out = capsys.readouterr().out
    assert out.startswith("gqa: 2 questions") and "accuracy" in out


def test_a_killed_one_is_of_its_checkpoint(
    checkpoint: Path, model: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = line(checkpoint, layouts.pope(tmp_path / "data"), tmp_path / "p.jsonl", "--batch-size", "2")
    model.kill_after = 1
    with pytest.raises(Killed):
        main(command)
    model.kill_after = None
    layouts.put(checkpoint / "manifest.json", '{"other": 1}')
    assert main(command) == 2
    assert "p.jsonl.partial: was begun with another checkpoint (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("exact_match", ["--beams", "2"], "--beams: is for the benchmarks"),
        ("exact_match", ["--shots", "0"], "--shots: is for the benchmarks"),
        ("exact_match", ["--sample"], "--sample: is for the benchmarks"),
        ("exact_match", ["--vqa-rule", "github"], "--vqa-rule: is for the benchmarks"),
        ("pope", ["--shots", "2"], "--prompts: open_flamingo is for models with gated cross-attention"),
        ("pope", ["--prompts", "caption_only"], "caption_only has no words for --task pope"),
        ("pope", ["--submission", "x"], "--submission: no server takes answers to pope"),
        ("pope", ["--top-p", "1.5"], "top_p"),
        ("vizwiz", [], "holds no val.json nor test.json"),
    ],
)
def test_wrong_input(
    task: str,
    more: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = layouts.pope(tmp_path / "data")
    assert main(line(checkpoint, data, tmp_path / "o.jsonl", *more, task=task)) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("megamm: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shots", "-1"], "expected one argument|is not a whole number, 0 or more"),
        (["--length-penalty", "x"], "invalid float value: 'x'"),
        (["--prompts", "x"], "invalid choice: 'x'"),
        (["--runs", "0"], "is not a whole number above 0"),
    ],
)
def test_wrong_usage(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(line(tmp_path, tmp_path, tmp_path / "o.jsonl", *more))
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert any(words in err for words in message.split("|"))
