"""The comparison of FP8 with bf16: its loop on a CPU (in bf16, there is no other), its verdicts, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType

import pytest

from megamm.device import fp8_status
from tests.dist.tiny import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
WORKS = fp8_status()["delayed"].works


@pytest.fixture(scope="module")
def fp8() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_fp8", ROOT / "tools/benchmark/fp8.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_loop_trains(fp8: ModuleType, tmp_path: Path) -> None:
    overrides = {"training.precision": "bf16", "optimizer.lr": "1e-2", "model.image_token_id": 3}
    curve = fp8.run("bf16", tiny_recipe("merged", overrides), 8, "local")
    assert len(curve.losses) == len(curve.seconds) == 8 and curve.losses[-1] < 0.9 * curve.losses[0]
    # the losses of a second one are a little off
    other = fp8.Curve("FP8 delayed", [loss * 1.01 for loss in curve.losses], [s / 2 for s in curve.seconds])
    assert fp8.write([curve, other], 0.02, "a machine", tmp_path) == []
    found = (tmp_path / "fp8.md").read_text()
    assert "| FP8 delayed |" in found and "| 2.00 |" in found and "| 1.00% |" in found
    assert len(ET.parse(tmp_path / "fp8.svg").findall(".//{*}polyline")) == 2
    assert json.loads((tmp_path / "fp8.json").read_text())["runs"][0]["losses"] == curve.losses


def test_verdicts(fp8: ModuleType) -> None:
    reference = fp8.Curve("bf16", [4.0, 2.0], [1.0, 1.0])

    def verdict(*losses: float) -> list[str]:
        found: list[str] = fp8.departures(reference, fp8.Curve("FP8", list(losses), [1.0, 1.0]), 0.05)
        return found

    assert verdict(4.0, 2.09) == []
    assert verdict(4.0, 2.11) == [
        "FP8: at step 2 the loss departs by 5.50% from that of bf16, more than 5.00%"
    ]
    assert verdict(3.0, 2.0)[0].startswith("FP8: at step 1 the loss departs by 25.00%")
    assert "no number" in verdict(4.0, float("nan"))[0]
    assert "not in effect" in verdict(4.0, 2.0)[0]


def test_its_recipes_are_accepted(fp8: ModuleType) -> None:
    for scaling in ("off", "delayed", "current", "blockwise", "mxfp8"):
        assert fp8.recipe_of(scaling).training.fp8.scaling == scaling


def check(out: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "tools/fp8_check.sh"), str(out)]
    env = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)


@pytest.mark.skipif(WORKS, reason="FP8 works here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = check(tmp_path / "out", 100)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("tools/fp8_check.sh: FP8 with delayed scaling does not work here: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not WORKS, reason=fp8_status()["delayed"].reason)
def test_fp8_follows_bf16(tmp_path: Path) -> None:
    done = check(tmp_path, 280)
    assert done.returncode == 0, done.stderr
