"""`megamm parity` finds nothing where nothing is wrong, and what is wrong where something is."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megamm.cli import entry as cli
from megamm.parity.compare import Run
from megamm.parity.layouts import parse_layouts
from megamm.parity.processes import run_processes
from megamm.parity.run import Plan, Result, make_plan, run_layout, run_reference
from tests.dist.harness import fork_rank
from tests.dist.test_harness import _alive, _assert_dead
from tests.dist.tiny import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
LLAVA = ROOT / "examples" / "quickstart" / "llava.yaml"
FLAMINGO = ROOT / "examples" / "quickstart" / "flamingo.yaml"
TOLERANCE = 1e-5
TIMEOUT = 120.0


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The started processes import the workers of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forks of an interpreter that has imported everything."""
    monkeypatch.setattr("megamm.parity.run.run_processes", functools.partial(run_processes, start=fork_rank))


@functools.cache
def planned(assembly: str, layout: str) -> tuple[Plan, Run]:
    plan = make_plan(tiny_recipe(assembly), parse_layouts(layout), full_size=True)
    return plan, run_reference(plan, TIMEOUT)


def sabotaged(assembly: str, layout: str, worker: str, timeout: float = TIMEOUT) -> Result:
    plan, reference = planned(assembly, layout)
    target = f"tests.parity_command.workers:{worker}"
    result = run_layout(plan, plan.layouts[0], reference, TOLERANCE, timeout, target)
    assert not result.passed(TOLERANCE)
    return result


def test_the_quick_start_passes_in_two_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", str(LLAVA), "--layouts", "tp2,pp2vpp2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"] and [entry["layout"] for entry in document["layouts"]] == ["tp2", "pp2vpp2"]
    groups = {"vision", "connector", "embedding", "attention", "mlp", "output"}
    for entry in document["layouts"]:
        assert entry["processes"] == 2 and entry["first"] is None
        assert entry["gradients"].keys() == groups
        assert all(found["value"] <= TOLERANCE for found in entry["gradients"].values())
    # layouts sum in another order: exact equality would mean that something is compared with itself
    assert max(found["value"] for found in document["layouts"][0]["gradients"].values()) > 0
    assert "model.language.hidden_size 96 -> 64" in document["changes"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_cross_attention_passes_packed_frozen_and_recomputed(capsys: pytest.CaptureFixture[str]) -> None:
    layouts = "tp2sp,dp2,tp2pp2sp"
    overrides = ["data.pack=true", "training.freeze=[language]", "training.recompute.language=full"]
    assert cli.main(["parity", str(FLAMINGO), "--layouts", layouts, *overrides]) == 0
    out = capsys.readouterr().out
    header, *rows = out.split("\n\n")[1].splitlines()
    assert header.split() == ["layout", "loss", "grad", "norm", "vision", "connector", "cross_attention"]
    assert [(row.split()[0], row.split()[-1]) for row in rows] == [
        ("tp2sp", "pass"),
        ("dp2", "pass"),
        ("tp2pp2sp", "pass"),
    ]


@pytest.mark.usefixtures("forked")
def test_a_gradient_that_is_wrong_behind_right_outputs() -> None:
    found = sabotaged("cross_attention", "tp2sp", "unmarked").comparison
    assert found is not None and found.loss <= TOLERANCE and found.first is not None
    # the last norm is where the backward pass meets the first unmarked parameter
    assert (found.first.kind, found.first.name) == ("gradient", "language.decoder.final_layernorm.weight")
    assert found.gradients["output"].value > 0.01 and found.gradients["vision"].value <= TOLERANCE


@pytest.mark.usefixtures("forked")
def test_an_encoder_gradient_that_is_not_shared() -> None:
    found = sabotaged("merged", "tp2", "unshared").comparison
    assert found is not None and found.first is not None
    assert found.first.kind == "gradient" and found.first.name.startswith("vision.blocks.1.")
    assert {group for group, found in found.gradients.items() if found.value > TOLERANCE} == {"vision"}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("layout", "worker", "module", "place"),
    [
        ("tp2sp", "wrong_mlp", "language.decoder.layers.2.mlp", "rank"),  # summed: wrong on both ranks
        ("tp2", "wrong_encoder", "vision.blocks.1", "rank 1"),
    ],
)
def test_the_first_diverging_module_is_named(layout: str, worker: str, module: str, place: str) -> None:
    found = sabotaged("merged", layout, worker).comparison
    assert found is not None and found.first is not None
    assert (found.first.kind, found.first.name) == ("activation", module)
    assert place in found.first.place


def test_a_failure_is_a_row_with_the_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PID_DIR", str(tmp_path))
    monkeypatch.setattr("megamm.parity.run.run_reference", lambda plan, timeout: planned("merged", "tp2")[1])
    worker = "tests.parity_command.workers:dying"
    monkeypatch.setattr("megamm.parity.run.run_layout", functools.partial(run_layout, worker=worker))
    assert cli.main(["parity", str(LLAVA), "--layouts", "tp2,pp2"]) == 1
    row, out = "FAIL  tests.parity_command.workers:dying: rank 1 of 2 failed", capsys.readouterr().out
    assert out.count(row) == 2 and out.count("RuntimeError: out of paper") == 2
    # rank 0 may be killed while it still imports
    _assert_dead(tmp_path, max(2, len(list(tmp_path.glob("*.pid")))))


def test_a_layout_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PID_DIR", str(tmp_path))
    result = sabotaged("merged", "tp2", "hanging", timeout=15)
    assert "no answer from rank [0, 1] of 2 in 15 s" in result.failure
    assert "waiting for a printer" in result.failure
    _assert_dead(tmp_path, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        "from pathlib import Path; from megamm.parity.processes import run_processes\n"
        "target = 'tests.parity_command.workers:hanging'\n"
        f"run_processes(2, target, {{'recipe': ''}}, Path({str(tmp_path)!r}), 99)"
    )
    environment = {**os.environ, "PID_DIR": str(tmp_path)}
    caller = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert all(_alive(int(path.stem)) for path in tmp_path.glob("*.pid"))
    caller.send_signal(number)
    caller.wait(timeout=30)
    _assert_dead(tmp_path, 2)


def test_it_does_not_run_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["parity", str(LLAVA), "--layouts", "tp2"]) == 2
    assert "without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "tp2,dq2"], "'dq2' is not a layout; join tpN"),
        (["--layouts", ""], "'' is not a layout"),
        (["--layouts", "tp2tp2"], "'tp2tp2' has tp twice"),
        (["--layouts", "dp100"], "'dp100' needs 100 processes"),
        (["--layouts", "sp"], "'sp' does not fit: parallel.sequence: needs parallel.tensor above 1"),
        (["--layouts", "vpp2"], "'vpp2' does not fit: parallel.virtual_pipeline"),
        (["--layouts", "cp2", "--data.pack=true"], "'cp2' does not fit: data.pack"),
        (["--layouts", "pp2", "--full-size"], "3 is not divisible by parallel.pipeline 2"),
        (["--layouts", "tp2", "--tolerance", "0"], "'0' is not a number above 0"),
        ([], "--layouts"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = cli.main(["parity", str(LLAVA), *arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1
