"""megamm plan, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megamm.cli.entry import main

RECIPE = """
name: vlm
run_dir: r
tokenizer: t
stage: instruct
model: {language: {preset: llama2-13b}, vision: {preset: clip-vit-l-14-336}}
data: {train: d, sequence_length: 2048}
training: {steps: 5000, global_batch_size: 128, micro_batch_size: 2, freeze: [vision]}
parallel: {tensor: 8, sequence: true, pipeline: 2}
hardware: {gpus: 32, gpu: a100-80gb}
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


def test_text(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", path, "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110
    assert "on 32 x A100-SXM4-80GB" in out and "TP8 PP2 x data 2; 32 micro-batches of 2" in out
    assert f"{13_350_839_296:,}" in out and f"{13_047_331_840:,}" in out  # LLaVA-1.5-13B, trained
    for words in (
        "GiB of a rank",
        "pipeline bubble",
        "MFU",
        "GPU-hours",
        "fits:",
        "too large, the smallest first: ",
        "--parallel.",
    ):
        assert words in out, words
    assert "TP1 PP1: needs" in out


def test_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["plan", path, "--json", "--gpus", "16", "--gpu", "h100-80gb", "--training.micro_batch_size=1"])
        == 0
    )
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["gpu"]) == (16, "H100-SXM5-80GB")
    assert found["layout"]["micro_batch_size"] == 1 and found["layout"]["data"] == 1
    step, stages = found["step"], found["memory"]["stages"]
    parts = ("forward", "backward", "recompute", "tensor", "pipeline", "bubble", "data", "optimizer")
    assert sum(step["schedule"][part] for part in parts) == pytest.approx(step["seconds"])
    assert step["mfu"] == pytest.approx(sum(found["flops"].values()) / (step["seconds"] * 16 * 989e12))
    assert found["stage_time"]["gpu_hours"] == pytest.approx(step["seconds"] * 5000 * 16 / 3600)
    assert len(stages) == 2 and found["memory"]["fits"] is True
    for stage in stages:
        kinds = [size for kind, size in stage.items() if kind not in ("total", "layers")]
        assert sum(kinds) == stage["total"]
    model = found["parameters"]["model"]
    assert sum(part["total"] for part in model.values()) == 13_350_839_296
    assert found["best"][0]["seconds"] <= found["best"][-1]["seconds"]
    assert {refused["kind"] for refused in found["refused"]} <= {"memory", "layout", "batch"}


def test_a_layout_that_does_not_fit_the_gpus_still_gets_proposals(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", path, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "TP8 PP2, does not work here" in out and "16 does not divide the 8 processes" in out.replace(
        "\n", ""
    )
    assert "fastest of" in out


def test_images_count_for_memory_and_time(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for arguments in (["--images", "1"], ["--images", "3"], []):
        assert main(["plan", path, "--json", "--top", "2", *arguments, "--data.max_images=3"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    one, three, unsaid = plans
    for found in (one, three, unsaid):
        assert found["best"][0]["memory"]["total"] <= found["memory_limit"] < found["gpu_memory"]
    assert one["step"]["seconds"] == unsaid["step"]["seconds"] < three["step"]["seconds"]
    features = [found["memory"]["stages"][0]["vision_features"] for found in plans]
    assert features[0] < features[1] == features[2]  # unsaid: room for as many as there may be
    assert (unsaid["images_per_row"], unsaid["images_in_memory"]) == (1, 3)
    assert main(["plan", path, "--images", "4"]) == 2  # of 576 positions, in rows of 2048
    assert "--images: 4 in a row are more than" in capsys.readouterr().err


def test_fp8(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused where there is none; elsewhere MFU is a share of the bf16 peak, as it is in a run."""
    arguments = ["plan", path, "--training.fp8.scaling=delayed", "--top", "1"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.replace("\n", " ")
    assert (
        "delayed does not work on A100-SXM4-80GB, which has no FP8 arithmetic; plan for h100-80gb or" in error
    )
    assert main([*arguments, "--gpu", "h100"]) == 0
    assert "of the bf16 peak; " in capsys.readouterr().out


def test_what_fits_is_what_would_be_proposed(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One limit for the recipe's own layout and for the others, and the layouts next to it come first."""
    assert main(["plan", path, "--json", "--top", "1", "--gpus", "32", "--gpu", "a100-40gb"]) == 0
    found = json.loads(capsys.readouterr().out)
    most = max(stage["total"] for stage in found["memory"]["stages"])
    assert found["memory"]["fits"] is (most <= found["memory_limit"])
    needed = [refused["needed"] for refused in found["refused"] if refused["kind"] == "memory"]
    assert needed == sorted(needed) and needed[0] > found["memory_limit"]


def test_help_documents_the_json(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert main(["plan", path, "--json", "--top", "1"]) == 0
    for key in json.loads(capsys.readouterr().out):
        assert f"{key}" in text, key


def test_bad_input(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--gpu", "b200"], "hardware.gpu: 'b200' is not known; there are a100-40gb"),
        (["--gpus", "0"], "not a whole number above 0"),
        (["--parallel.tensor=3"], "not divisible by parallel.tensor 3"),
    ):
        try:
            assert main(["plan", path, *arguments]) == 2
        except SystemExit as stop:
            assert stop.code == 2
        assert words in capsys.readouterr().err.replace("\n", "")


def test_neither_torch_nor_megatron_is_imported(path: str) -> None:
    code = (
        "import sys, time; from megamm.cli.entry import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'megatron', 'numpy') if m in sys.modules], time.process_time())"
    )
    command = [sys.executable, "-c", code, "plan", path, "--gpus", "512", "--training.global_batch_size=2048"]
    last = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.splitlines()[-1]
    modules, _, seconds = last.rpartition(" ")
    assert modules == "[]"
    assert float(seconds) < 4
