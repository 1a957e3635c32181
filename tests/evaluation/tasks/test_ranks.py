"""Evaluations by several processes: questions are shared out, and one rank's end is everybody's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.harness import run_distributed
from tests.evaluation.tasks import layouts
from tests.evaluation.tasks.stand_in import StandIn, evaluated

TARGET = "tests.evaluation.tasks.workers:answer"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return layouts.vqa(tmp_path / "data", count=9)


def alone(data: Path, out: Path) -> bytes:
    """What one process writes."""
    evaluated(StandIn(lambda prompt, numbers, decoding: f"picture {numbers[0]}"), "vqav2", data, out)
    return out.read_bytes()


def test_copies_share_out_the_questions(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first, second = run_distributed(2, TARGET, {"data": str(data), "out": str(out), "copies": 2})
    assert sorted(first["asked"] + second["asked"]) == list(range(9))
    assert [len(rank["asked"]) for rank in (first, second)] == [6, 3]  # three batches and two
    assert first["result"]["n"] == 9 and second["result"] is None
    assert out.read_bytes() == alone(data, tmp_path / "alone.jsonl")
    assert not list(tmp_path.glob("*.partial*"))


def test_ranks_of_one_copy_are_asked_together_and_one_writes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    found = run_distributed(2, TARGET, {"data": str(data), "out": str(out), "copies": 1})
    assert [rank["asked"] for rank in found] == [list(range(9))] * 2
    assert out.read_bytes() == alone(data, tmp_path / "alone.jsonl")


def test_a_copy_may_be_slower_than_collectives_wait(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    found = run_distributed(2, TARGET, {"data": str(data), "out": str(out), "copies": 2, "slow": 1})
    assert found[0]["seconds"] > 8 and found[0]["result"]["n"] == 9 and not found[0]["error"]


@pytest.mark.parametrize("fails", [0, 1])
def test_nobody_waits_for_a_rank_that_failed(fails: int, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    arguments = {"data": str(data), "out": str(out), "copies": 2}
    found = run_distributed(2, TARGET, arguments | {"fails": fails})
    assert found[fails]["error"] == "out of memory"
    other = found[1 - fails]["error"]
    assert "started again, the evaluation goes on from the answers that were written" in other
    assert other.startswith((f"rank {fails}: out of memory;", "another rank has died"))  # with its store
    assert all(rank["seconds"] < 10 for rank in found)
    assert not out.exists() and len(list(tmp_path.glob("out.jsonl.partial.*"))) == 2
    again = run_distributed(2, TARGET, arguments)
    assert 0 < sum(len(rank["asked"]) for rank in again) < 9
    assert out.read_bytes() == alone(data, tmp_path / "alone.jsonl")


def test_another_number_of_copies_goes_on(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run_distributed(2, TARGET, {"data": str(data), "out": str(out), "copies": 2, "fails": 1})
    model = StandIn(lambda prompt, numbers, decoding: f"picture {numbers[0]}")
    from megamm.evaluation.tasks import TaskSettings

    evaluated(model, "vqav2", data, out, TaskSettings(batch_size=2))
    assert 0 < len(model.asked) < 9
    assert out.read_bytes() == alone(data, tmp_path / "alone.jsonl")
    assert not list(tmp_path.glob("*.partial*"))
