"""The run log: lines, rates, metrics.jsonl after a kill and a resume, TensorBoard."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megamm.config import Recipe
from megamm.planning.flops import flops_per_step, hardware_flops_per_step
from megamm.recipe import recipe_from_dict
from megamm.training.logging import Rates, RunLogger, StepStats, format_line
from megamm.training.metrics import SmoothedLoss, read_metrics


def recipe(*overrides: str) -> Recipe:
    raw: dict[str, Any] = {
        "name": "logged",
        "run_dir": "r",
        "tokenizer": "t",
        "model": {"language": {"preset": "tiny-llama"}, "vision": {"preset": "tiny-vit"}},
        "data": {"sequence_length": 128},
        "log": {"interval": 2, "tensorboard": False},
    }
    return recipe_from_dict(raw, overrides=overrides)


def stats(step: int, **changes: Any) -> StepStats:
    values: dict[str, Any] = {
        "step": step,
        "consumed_samples": 32 * step,
        "loss": 2.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "num_tokens": 4096,
        "num_images": 32,
        "num_padding": 96,
        "num_labels": 1024,
        "num_pairs": 4096 * 64,
        "sequence_length": 128,
        "seconds": 0.5,
        "data_wait": 0.05,
        "skipped_samples": 3,
        "skipped_steps": 1,
        "memory": 3 << 29,
    }
    return StepStats(**(values | changes))


def test_line_and_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    r = recipe("training.precision=bf16")
    with RunLogger(tmp_path, r, 10, world_size=2, device_name="NVIDIA H200") as log:
        log.step(stats(1))
        assert capsys.readouterr().out == ""
        log.step(stats(2, seconds=1.5))
    line = capsys.readouterr().out.strip()
    flops_per_s = flops_per_step(r, 8192, 64, 2048, 8192 * 64) / 2.0 / 2
    expected = [
        "step  2/10",
        "64 samples",
        "loss 1.5000",
        "lr 1.00e-03",
        "grad norm 1.5",
        "4,096 tokens/s",
        "32.0 images/s",
        f"{flops_per_s / 1e12:.3g} TFLOP/s",
        f"MFU {flops_per_s / 989e12:.1%}",
        "data wait 5.0%",
        "skipped 3 samples, 1 steps",
        "1.50 GiB",
        "ETA 0:00:08",
    ]
    assert line.split(" | ") == expected
    text = (tmp_path / "log.txt").read_text()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ " + re.escape(line) + "\n", text)


def test_last_step_always_has_a_line_and_cpu_no_mfu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path, recipe(), 3) as log:
        for step in (1, 2, 3):
            log.step(stats(step))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 2/3", "step 3/3"]
    assert "MFU" not in lines[0]


def test_resume_drops_later_rows_and_a_cut_line(tmp_path: Path) -> None:
    with RunLogger(tmp_path, recipe(), 9) as log:
        for step in range(1, 6):
            log.step(stats(step))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 6, "lo')  # killed while it wrote
    with RunLogger(tmp_path, recipe(), 9, start_step=3) as log:
        log.step(stats(4, loss=0.125))
    rows = list(read_metrics(path))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] == 0.125
    assert rows[0]["loss"] == 2.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.txt", "metrics.jsonl"]


def test_fresh_start_in_an_old_directory_has_a_clean_curve(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLogger(tmp_path, recipe(), 9) as log:
            log.step(stats(1))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_rows_are_on_disk_at_once_and_valid_json(tmp_path: Path) -> None:
    log = RunLogger(tmp_path, recipe(), 9)
    log.step(stats(1, loss=math.nan, grad_norm=math.inf))

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "metrics.jsonl").read_text()  # before the logger is closed
    row = json.loads(text, parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] is None
    assert row["tokens_per_s"] == 8192 and row["data_wait"] == pytest.approx(0.1)
    log.close()


def test_line_of_a_window_with_a_nan() -> None:
    window = [stats(1, loss=math.nan), stats(2)]
    with_nan = format_line(window, rates_of(window), 10)
    assert "loss 1.0000" in with_nan
    assert "loss nan" in format_line(window[:1], rates_of(window[:1]), 10)


def rates_of(window: list[StepStats]) -> Rates:
    return Rates(1.0, 1.0, 1.0, None, None, 0.0)


def test_recomputation_counts_for_hfu_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = recipe("training.precision=bf16", "log.interval=1")
    again = recipe("training.precision=bf16", "log.interval=1", "training.recompute.language=full")
    rows = []
    for r in (plain, again):
        with RunLogger(tmp_path, r, 9, device_name="NVIDIA H100 80GB HBM3") as log:
            log.step(stats(1, seconds=1e-4))
        rows += read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["mfu"] == rows[1]["mfu"] == pytest.approx(rows[0]["hfu"])
    counts = (4096, 32, 1024, 4096 * 64, 128)
    expected = hardware_flops_per_step(again, *counts) / flops_per_step(again, *counts)
    assert rows[1]["hfu"] / rows[1]["mfu"] == pytest.approx(expected) and expected > 1.1
    lines = capsys.readouterr().out.splitlines()
    assert "HFU" not in lines[0] and f"| MFU {rows[1]['mfu']:.1%} | HFU {rows[1]['hfu']:.1%} |" in lines[1]


def test_smoothed_loss_has_no_bias_and_its_half_life() -> None:
    smoothed = SmoothedLoss(20)
    assert smoothed.add(math.nan) is None and smoothed.add(None) is None
    assert smoothed.add(7.0) == pytest.approx(7.0)
    for _ in range(500):
        smoothed.add(3.0)
    before = smoothed.add(math.inf)
    assert before == pytest.approx(3.0, abs=1e-6)
    steps = [smoothed.add(1.0) for _ in range(20)]
    assert steps[-1] == pytest.approx(2.0, abs=1e-6)  # half of the way after a half-life


def test_a_resumed_run_goes_on_with_its_numbers(tmp_path: Path) -> None:
    r, losses = recipe("log.loss_half_life=3"), [5.1, 4.7, math.nan, 3.9, 4.4, 3.3]

    def log_steps(folder: Path, first: int, last: int) -> list[float | None]:
        with RunLogger(folder, r, 9, start_step=first - 1) as log:
            for step in range(first, last + 1):
                skipped = log.skipped_samples + step if step == first else step
                log.step(stats(step, loss=losses[step - 1], skipped_samples=skipped))
            log.validation(last, 1.0, 0.5)
        return [row["loss_smoothed"] for row in read_metrics(folder / "metrics.jsonl")]

    straight = log_steps(tmp_path / "a", 1, 6)
    log_steps(tmp_path / "b", 1, 5)  # killed, after a checkpoint at step 3
    assert log_steps(tmp_path / "b", 4, 6) == straight
    rows = list(read_metrics(tmp_path / "b" / "metrics.jsonl"))
    assert [row["skipped_samples"] for row in rows] == [1, 2, 3, 7, 5, 6]
    assert [row["step"] for row in read_metrics(tmp_path / "b" / "validation.jsonl")] == [6]


def test_validation_is_told_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLogger(tmp_path, recipe("log.tensorboard=true"), 9) as log:
        log.validation(4, 2.5, 1.25)
        log.validation(8, math.nan, 1.25)
    assert "step 4/9 | validation loss 2.5000 | 1.2 s" in capsys.readouterr().out
    rows = list(read_metrics(tmp_path / "validation.jsonl"))
    assert [(row["step"], row["validation_loss"]) for row in rows] == [(4, 2.5), (8, None)]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Scalars("validation/loss")[0].value == 2.5


def test_damaged_rows_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\n{"step": \n[1]\n{"loss": 3}\n{"step": 2}\n{"step": 3}')
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_events_and_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warm = recipe("training.steps=5", "optimizer.warmup_steps=10")
    with RunLogger(tmp_path, warm, 5) as log:
        log.event("resumed from step 3")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("warning: optimizer.warmup_steps") and out[1] == "resumed from step 3"
    assert "resumed from step 3" in (tmp_path / "log.txt").read_text()


def test_tensorboard_has_the_curve_without_folds(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    r = recipe("log.tensorboard=true")
    with RunLogger(tmp_path, r, 9) as log:
        for step in (1, 2, 3):
            log.step(stats(step))
    with RunLogger(tmp_path, r, 9, start_step=2) as log:
        log.step(stats(3, loss=0.5))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    curve = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert curve == [(1, 2.0), (2, 1.0), (3, 0.5)]
    assert "train/tokens_per_s" in events.Tags()["scalars"]
    assert "train/mfu" not in events.Tags()["scalars"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    with RunLogger(tmp_path, recipe(), 4, start_step=1) as log:
        log.step(stats(2))
        log.event("[saved] checkpoint")  # brackets are not markup
    shown = screen.getvalue()
    assert "[saved] checkpoint" in shown and "loss 1.0000" in shown
    assert "2/4" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_each_step_counts_with_its_own_length(tmp_path: Path) -> None:
    """A window leaves out more of long rows than of short ones."""
    r, lengths = recipe("training.precision=bf16", "model.language.sliding_window=32"), (128, 48)
    with RunLogger(tmp_path, r, 2) as log:
        for number, length in enumerate(lengths, start=1):
            log.step(stats(number, sequence_length=length, num_pairs=4096 * length // 2))
    rows = list(read_metrics(tmp_path / "metrics.jsonl"))
    alone = []
    for length in lengths:
        r.data.sequence_length = length
        alone.append(flops_per_step(r, 4096, 32, 1024))
    assert [row["tflops_per_device"] * 0.5e12 for row in rows] == pytest.approx(alone)
    assert f"{sum(alone) / 1e12:.3g} TFLOP/s" in (tmp_path / "log.txt").read_text()
