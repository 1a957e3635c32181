"""Evaluations that are killed go on, and end with the bytes of those that were not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from megamm.errors import InputError
from megamm.evaluation.tasks import TaskSettings
from megamm.evaluation.tasks.partial import AnswerFile, partial_files, partial_path
from megamm.evaluation.tasks.scoring import references_path
from tests.evaluation.tasks import layouts
from tests.evaluation.tasks.stand_in import Killed, StandIn, evaluated

COUNT, BATCH = 11, 3
BATCHES = -(-COUNT // BATCH)


def answer(prompt: str, numbers: list[int], decoding: object) -> str:
    return f"ä {numbers[0]}\n"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return layouts.vqa(tmp_path / "data", count=COUNT)


def run(data: Path, out: Path, kill_after: int | None = None, **settings: object) -> StandIn:
    model = StandIn(answer, kill_after)
    chosen = TaskSettings(**{"batch_size": BATCH, **settings})  # type: ignore[arg-type]
    evaluated(model, "vqav2", data, out, chosen)
    return model


def written(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), references_path(out).read_bytes()


@pytest.mark.parametrize("batches", range(BATCHES))
def test_killed_at_every_batch(batches: int, data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(data, whole)
    with pytest.raises(Killed):
        run(data, out, kill_after=batches)
    assert not out.exists()
    lines = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    assert json.loads(lines[0])["task"] == "vqav2"
    assert len(lines) == 1 + sum(run_sizes(batches))
    model = run(data, out)
    assert len(model.batches) == BATCHES - batches
    assert written(out) == written(whole) and partial_files(out) == []


def run_sizes(batches: int) -> list[int]:
    """Questions in each of the first batches: the smallest full one, then from the last down."""
    sizes = [BATCH] * (COUNT // BATCH) + [COUNT % BATCH]
    return (sizes[:1] + sizes[:0:-1])[:batches]


def test_a_process_that_is_killed_leaves_whole_answers(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    child = os.fork()
    if child == 0:

        def deadly(prompt: str, numbers: list[int], decoding: object) -> str:
            if len(model.batches) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer(prompt, numbers, decoding)

        model = StandIn(deadly)
        evaluated(model, "vqav2", data, out, TaskSettings(batch_size=BATCH))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    whole = tmp_path / "whole.jsonl"
    run(data, whole)
    assert len(run(data, out).batches) == BATCHES - 2 and written(out) == written(whole)


@pytest.mark.parametrize("cut", [1, 5, 40, 75])
def test_a_line_without_an_end_is_asked_again(cut: int, data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(data, whole)
    with pytest.raises(Killed):
        run(data, out, kill_after=2)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-cut])
    model = run(data, out)
    assert BATCHES - 2 < len(model.batches) <= BATCHES - 1
    assert written(out) == written(whole)


def test_a_file_that_ends_within_its_first_line_counts_for_nothing(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text('{"task": "vq')
    assert len(run(data, out).batches) == BATCHES and out.exists()


def test_another_number_of_questions_at_once_goes_on_too(data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(data, whole)
    with pytest.raises(Killed):
        run(data, out, kill_after=2)
    model = run(data, out, batch_size=2)
    assert sum(model.batches) < COUNT and written(out) == written(whole)


def test_answers_of_other_copies_count(data: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(data, whole)
    with pytest.raises(Killed):
        run(data, out, kill_after=2)
    partial_path(out, 0, 1).rename(partial_path(out, 1, 2))
    (tmp_path / "out.jsonl.partial.txt").write_text("notes of the user")
    model = run(data, out)
    assert len(model.batches) == BATCHES - 2 and written(out) == written(whole)
    assert (tmp_path / "out.jsonl.partial.txt").exists()


def test_runs_go_on_where_they_stopped(data: Path, tmp_path: Path) -> None:
    for name, kill_after in (("whole", None), ("out", BATCHES + 1)):
        out = tmp_path / f"{name}.jsonl"
        settings = {"runs": 2, "decoding": {"sample": True}}
        if kill_after is not None:
            with pytest.raises(Killed):
                run(data, out, kill_after, **settings)
        model = run(data, out, **settings)
    assert len(model.batches) == BATCHES - 1
    for number in (0, 1):
        names = [tmp_path / f"{name}.run{number}.jsonl" for name in ("whole", "out")]
        assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"decoding": {"beams": 2}}, r"decoding\.vqa\.beams \(5, now 2\)"),
        ({"prompts": "infimm"}, r"decoding\.vqa\.|data and prompts"),
        ({"limit": 5}, "data and prompts"),
        ({"decoding": {"sample": True}}, r"decoding\.vqa\.sample"),
    ],
)
def test_answers_of_another_evaluation_are_refused(
    settings: dict[str, object], key: str, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(data, out, kill_after=1)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(InputError, match=rf"out\.jsonl\.partial: was begun with another .*{key}.*delete it"):
        run(data, out, **settings)
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"question": 99, "row": {}}', '{"question": "1", "row": {}}', "\0\0"]
)
def test_damaged_answers(line: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(data, out, kill_after=1)
    with open(tmp_path / "out.jsonl.partial", "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(InputError, match=r"partial: line 5: is damaged; delete the file to begin anew"):
        run(data, out)


def test_each_batch_reaches_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "p"
    file = AnswerFile(path, {"task": "t"})
    file.append([(0, {"id": "x"}), (3, {"id": "y"})])
    assert (
        path.read_text()
        == '{"task": "t"}\n{"question": 0, "row": {"id": "x"}}\n{"question": 3, "row": {"id": "y"}}\n'
    )
    file.close()
