"""`megamm score`: what it prints, what it refuses, and that it starts fast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamm.cli import entry as cli
from megamm.cli import score as command
from megamm.evaluation.scores import METRICS
from megamm.evaluation.scores.vqa import RULES

ROOT = Path(__file__).parents[2]
REFERENCES = [
    {"id": 1, "answers": ["yes"] * 10, "answer_type": "yes/no"},
    {"id": 2, "answers": ["two"] * 6 + ["three"] * 4, "answer_type": "number"},
]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Options with two runs of predictions and their references."""
    first = lines(tmp_path / "p0.jsonl", [{"id": 1, "prediction": "Yes"}, {"id": 2, "prediction": "2"}])
    second = lines(tmp_path / "p1.jsonl", [{"id": 1, "prediction": "no"}])
    return ["--predictions", first, second, "--references", lines(tmp_path / "r.jsonl", REFERENCES)]


def test_names_are_those_of_the_metrics() -> None:
    assert (command.METRICS, command.VQA_RULES) == (METRICS, RULES)


def test_json(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one = [*files[:2], *files[3:]]
    assert cli.main(["score", "--metric", "vqa", *one, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 100.0 and found["n"] == 2 and found["unanswered"] == 0
    assert cli.main(["score", "--metric", "vqa", *one, "--vqa-rule", "github", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 50.0


def test_table(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "--metric", "vqa", *files[:2], *files[3:]]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["vqa: 2 questions", "accuracy  100.00"]


def test_several_runs(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", "--metric", "vqa", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == 50.0 and found["std"]["accuracy"] == pytest.approx(5000**0.5)
    assert [run["accuracy"] for run in found["runs"]] == [100.0, 0.0]
    assert cli.main(["score", "--metric", "vqa", *files]) == 0
    assert "accuracy  50.00  70.71  100.00   0.00" in capsys.readouterr().out
    repeated = [*files[:2], "--predictions", *files[2:]]
    assert cli.main(["score", "--metric", "vqa", *repeated, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": 1, "prediction": "a"}, {"id": "1", "prediction": "b"}],
            "p0.jsonl: line 2: the id '1' stands in",
        ),
        ([{"id": 3, "prediction": "a"}], "p0.jsonl: line 1: no reference has the id '3'"),
        ([{"id": 1}], 'p0.jsonl: line 1: has no "prediction"'),
        ([7], "p0.jsonl: begins with '7'"),
    ],
)
def test_wrong_rows_are_one_sentence_and_exit_2(
    files: list[str], rows: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines(Path(files[1]), rows)
    assert cli.main(["score", "--metric", "vqa", *files]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megamm: ") and err.count("\n") == 1
    assert message in err


def test_it_imports_no_torch(files: list[str]) -> None:
    code = (
        "import sys; from megamm.cli import main\n"
        f"main(['score', '--metric', 'vqa', *{files!r}])\n"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
