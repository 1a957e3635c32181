"""F8: losses and gradients that are no numbers, and spikes: left out on all ranks, counted, and gone back
from."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.config import AnomaliesConfig
from megamm.engine.manifest import list_checkpoints, read_manifest, step_directory
from megamm.training.anomalies import AnomalyPolicy, Objection
from megamm.training.metrics import read_metrics
from tests.faults.inject import fault
from tests.training.runs import STEPS, assert_same_end, run, state_of, write_recipe

NAN = float("nan")


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def recipe(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> Path:
    return write_recipe(tmp_path, dataset_dir, tokenizer_dir)


# --- the policy -----------------------------------------------------------------------------------------


def judged(policy: AnomalyPolicy, losses: list[float], group: int = 0) -> list[str]:
    """What follows from each loss."""
    said = []
    for loss in losses:
        objection = policy.objection(loss, 1.0, group)
        if objection:
            said.append(f"{objection.name}: {policy.skipped(objection)}")
        else:
            policy.updated(loss, group)
            said.append("update")
    return said


def test_k_in_a_row_roll_back_and_more_rollbacks_stop() -> None:
    policy = AnomalyPolicy(AnomaliesConfig(in_a_row=3, max_rollbacks=1))
    go_on, back, stop = (f"NON_FINITE: {what}" for what in ("go on", "roll back", "stop"))
    assert judged(policy, [NAN, NAN, 1.0, NAN, NAN, NAN]) == [go_on, go_on, "update", go_on, go_on, back]
    policy.rolled_back()
    assert judged(policy, [NAN, NAN, NAN]) == [go_on, go_on, stop]
    assert (policy.skipped_steps, policy.rollbacks) == (8, 1)
    assert judged(AnomalyPolicy(AnomaliesConfig(non_finite="stop")), [1.0, NAN]) == ["update", stop]


@pytest.mark.parametrize("norm", [NAN, float("inf"), float("-inf")])
def test_a_gradient_speaks_against_an_update(norm: float) -> None:
    assert AnomalyPolicy(AnomaliesConfig()).objection(1.0, norm, 0) is Objection.NON_FINITE


def test_a_spike_is_one_among_the_losses_of_its_group() -> None:
    policy = AnomalyPolicy(AnomaliesConfig(spike_factor=3, spike_window=4, in_a_row=9))
    assert judged(policy, [9.0, 1.0, 50.0]) == ["update"] * 3, "nothing is usual yet"
    assert judged(policy, [2.0, 2.0, 2.0], group=1) == ["update"] * 3
    assert judged(policy, [1.0, 1.0, 1.0, 1.0, 3.0, 3.1]) == ["update"] * 5 + ["SPIKE: go on"]
    assert judged(policy, [9.0, NAN, 6.0, 12.1], group=1) == [
        "update",
        "NON_FINITE: go on",
        "update",
        "SPIKE: go on",
    ]


def test_a_resumed_policy_decides_as_the_first_one() -> None:
    config = AnomaliesConfig(spike_factor=2, spike_window=3, in_a_row=4)
    draw = random.SystemRandom()
    losses = [draw.choice([1.0, 1.1, 1.5, 2.4, NAN]) for _ in range(60)]
    cut = draw.randint(1, 59)
    whole, first = AnomalyPolicy(config), AnomalyPolicy(config)
    straight = judged(whole, losses)
    before = judged(first, losses[:cut])
    again = AnomalyPolicy(config, json.loads(json.dumps(first.state())))
    assert before + judged(again, losses[cut:]) == straight, (losses, cut)
    assert again.state() == whole.state()


# --- runs -----------------------------------------------------------------------------------------------


CASES = {
    "one_replica": ("nan_gradient", 2, ["--parallel.distributed_optimizer=false"]),
    "one_shard": ("nan_gradient", 2, ["--training.precision=bf16"]),
    "one_stage": ("inf_gradient", 2, ["--parallel.pipeline=2"]),
    "loss": ("nan_loss", 1, []),
}


@pytest.mark.parametrize(
    "case", ["one_replica", "one_stage", pytest.param("one_shard", marks=pytest.mark.faults), "loss"]
)
def test_the_update_is_left_out_on_all_ranks(case: str, tmp_path: Path, recipe: Path) -> None:
    """Rank 1 alone has the fault. The last step, which is saved although its update is left out, has the
    weights, moments and step counts of the one before it."""
    kind, processes, layout = CASES[case]
    log, run_dir, last = tmp_path / "log", tmp_path / "run", random.SystemRandom().randint(2, 5)
    overrides = ["--checkpoint.interval=1", f"--training.steps={last}", *layout]
    injected = fault(kind, [last], rank=processes - 1)
    assert run(recipe, log, *overrides, processes=processes, **injected) == 0, log.read_text()
    rows = list(read_metrics(run_dir / "metrics.jsonl"))
    assert [row["skipped_steps"] for row in rows] == [0] * (last - 1) + [1]
    (incident,) = incidents(run_dir)
    assert (incident["kind"], incident["step"]) == ("skipped_step", last)
    assert sorted(map(len, incident["samples"])) == [4, 4], "those of the whole step"
    assert bool(incident["non_finite_gradients"]) == (kind != "nan_loss")
    after, before = list_checkpoints(run_dir / "checkpoints")[:2]
    assert read_manifest(after).progress.consumed_samples == 8 * last
    saved, unchanged = state_of(after), state_of(before)
    assert saved.keys() == unchanged.keys() and any("exp_avg_sq" in name for name in saved)
    for name in saved:
        assert torch.equal(saved[name], unchanged[name]), name
    assert step_counts(after) == step_counts(before) == {last - 1}


def step_counts(checkpoint: Path) -> set[int]:
    """Updates that the optimizer's groups have counted."""
    state = torch.load(checkpoint / "shards" / "common.pt", weights_only=False)["optimizer"]
    state = state.get("optimizer", state)  # the replicated optimizer's lies bare
    return {group["step"] for group in state["param_groups"]}


def test_a_run_goes_back_and_leaves_out_the_data(tmp_path: Path, recipe: Path) -> None:
    """It ends as one that goes on from the same checkpoint with the data behind. Step 6 is saved right behind
    the update that went wrong, so that this checkpoint is of no use."""
    log, run_dir, bad = tmp_path / "log", tmp_path / "run", random.SystemRandom().randint(6, 8)
    back = 3 if bad == 6 else 6
    settings = ["--anomalies.in_a_row=3", "--optimizer.warmup_steps=0"]
    assert run(recipe, log, *settings, **fault("bad_weights", [bad])) == 0, log.read_text()
    rows = list(read_metrics(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    seen = [*range(1, back + 1), *range(bad + 4, bad + 4 + STEPS - back)]
    assert [row["consumed_samples"] // 8 for row in rows] == seen
    kinds = [(incident["kind"], incident["step"]) for incident in incidents(run_dir)]
    assert kinds == [("skipped_step", bad + n) for n in (1, 2, 3)] + [("rollback", back)]
    assert ("NaN or infinite" in log.read_text()) == (bad == 6)
    assert rows[-1]["skipped_steps"] == 3

    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    kept = again / "checkpoints" / step_directory(back)
    for newer in list_checkpoints(again / "checkpoints"):
        if newer > kept:
            shutil.rmtree(newer)
    consumed = 8 * (bad + 3)
    moved = replace(read_manifest(kept), consumed_samples=consumed, data_position=[consumed])
    (kept / "manifest.json").write_text(moved.to_json())
    assert run(recipe, log, *settings, f"--run_dir={again}") == 0, log.read_text()
    assert f"resumed at step {back} ({consumed} samples seen)" in log.read_text()
    assert_same_end(run_dir, again)


@pytest.mark.parametrize(
    "interval, words", [(1, "after 1 ways back; training diverged"), (0, "no checkpoint before them")]
)
def test_a_run_that_keeps_failing_stops(interval: int, words: str, tmp_path: Path, recipe: Path) -> None:
    log = tmp_path / "log"
    settings = ["--anomalies.in_a_row=2", "--anomalies.max_rollbacks=1", f"--checkpoint.interval={interval}"]
    assert run(recipe, log, *settings, **fault("nan_loss", list(range(4, 99)))) == 1
    said = [line for line in log.read_text().splitlines() if line.startswith("megamm: ")]
    assert len(said) == 1 and words in said[0] and "Traceback" not in log.read_text()
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[:1]
    assert [path.name for path in newest] == (["step_00000003"] if interval else [])


def test_a_run_never_goes_back_to_bad_weights(tmp_path: Path, recipe: Path) -> None:
    """The only checkpoint was saved right behind the update that went wrong."""
    log = tmp_path / "log"
    assert run(recipe, log, "--anomalies.in_a_row=2", **fault("bad_weights", [3])) == 1, log.read_text()
    assert "step_00000003: has weights or moments that are NaN or infinite" in log.read_text()
    said = [line for line in log.read_text().splitlines() if line.startswith("megamm: ")]
    assert len(said) == 1 and "no checkpoint before them" in said[0]


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.tensor=1"])
def test_a_spike_is_left_out_in_every_layout(layout: str, tmp_path: Path, recipe: Path) -> None:
    log, spikes = tmp_path / "log", sorted(random.SystemRandom().sample(range(5, STEPS + 1), 3))
    settings = ["--anomalies.spike_factor=2", "--anomalies.spike_window=4", layout]
    assert run(recipe, log, *settings, processes=2, **fault("spike", spikes)) == 0, log.read_text()
    skipped = [row["skipped_steps"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert skipped == [sum(spike <= step for spike in spikes) for step in range(1, STEPS + 1)]
    assert {incident["kind"] for incident in incidents(tmp_path / "run")} == {"skipped_step"}


@pytest.mark.faults
@pytest.mark.parametrize("layout", ["--parallel.tensor=2", "--parallel.pipeline=2"])
def test_going_back_in_every_layout(layout: str, tmp_path: Path, recipe: Path) -> None:
    """One rank alone has bad weights, and they are saved."""
    log, injected = tmp_path / "log", fault("bad_weights", [6], rank=random.SystemRandom().randint(0, 1))
    settings = ["--anomalies.in_a_row=2", layout]
    assert run(recipe, log, *settings, processes=2, **injected) == 0, log.read_text()
    kinds = [(incident["kind"], incident.get("to")) for incident in incidents(tmp_path / "run")]
    assert kinds == [("skipped_step", None), ("skipped_step", None), ("rollback", 3)]
    assert all(row["loss"] is not None for row in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_skipped_steps_are_counted_over_a_resume(tmp_path: Path, recipe: Path) -> None:
    log = tmp_path / "log"
    assert run(recipe, log, "--training.steps=6", **fault("nan_loss", [2, 3])) == 0, log.read_text()
    assert run(recipe, log) == 0, log.read_text()
    last = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))[-1]
    assert (last["step"], last["skipped_steps"]) == (STEPS, 2)
