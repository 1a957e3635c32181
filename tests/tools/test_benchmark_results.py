"""What the benchmarks share: turns, limits, results; exponents; RESULTS.md and its summary."""

from __future__ import annotations

import importlib
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SAMPLE = """# Results

Written by hand.

## Steps

<!-- generated: step -->
old
<!-- end: step -->

Also by hand.
"""


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_turns_go_there_and_back() -> None:
    order: list[str] = []

    def side(name: str) -> Any:
        return lambda: order.append(name) or len(order)

    found = module("common").turns({"a": side("a"), "b": side("b")}, rounds=2)
    assert order == ["a", "b", "b", "a", "a", "b"]  # the first round warms up
    assert found == {"a": [4, 5], "b": [3, 6]}


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    common = module("common")
    table = common.Table("title", ["x", "y"], note="note")
    table.add("one", 2)
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.add("one")
    aim = common.Aim("speed", ">= 2", "3", "peer 1", True)
    result = common.Result("here", [table], [aim], ["a.svg"], {"n": 1.5})
    result.write(tmp_path / "result.json")
    assert common.Result.read(tmp_path / "result.json") == result
    assert "| one | 2 |" in result.text() and "speed: target >= 2, found 3: reached" in result.text()


def test_a_limit_ends_the_whole_family(tmp_path: Path) -> None:
    common = module("common")
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    begin = "import subprocess, sys; print('begun', flush=True)"
    parent = f"{begin}; subprocess.run([sys.executable, '-c', {child!r}])"
    status, output = common.run_limited([sys.executable, "-c", parent], common.quiet_environment(), 1.5)
    assert status is None and output == "begun\n"
    time.sleep(3)
    assert not mark.exists()
    assert common.run_limited([sys.executable, "-c", "exit(3)"], {}, 60) == (3, "")


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7, -0.5])
def test_exponents_are_found(exponent: float) -> None:
    exponents = module("exponents")
    xs = [2.0, 4.0, 8.0, 16.0, 32.0]
    exact = exponents.fit(xs, [3 * x**exponent for x in xs])
    assert exact.exponent == pytest.approx(exponent, abs=1e-9) and exact.error < 1e-9
    assert exact.at(5.0) == pytest.approx(3 * 5.0**exponent)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, len(xs)))
    noisy = exponents.fit(xs, [3 * x**exponent * n for x, n in zip(xs, noise, strict=True)])
    assert 0.005 < noisy.error < 0.2 and abs(noisy.exponent - exponent) < 4 * noisy.error


def test_what_is_no_power_law_is_refused() -> None:
    exponents = module("exponents")
    for xs, ys in (([2.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0])):
        with pytest.raises(ValueError, match="no power law"):
            exponents.fit(xs, ys)


def test_growth_is_judged_and_drawn() -> None:
    exponents = module("exponents")
    xs = [1.0, 2.0, 4.0]
    linear = exponents.Growth("time", "layers", "ms", xs, [5.0, 10.0, 20.0], (1.0, 1.0))
    assert linear.is_as_expected and linear.cells()[2] == "1.00 ± 0.00" and linear.cells()[3] == "1"
    squared = exponents.Growth("time", "layers & <heads>", "ms", xs, [5.0, 20.0, 80.0], (0.0, 1.0))
    assert not squared.is_as_expected and squared.cells()[-1] == "not as expected"
    picture = ET.fromstring(squared.picture())
    assert len(picture.findall(".//{*}circle")) == 3 and len(picture.findall(".//{*}polyline")) == 1
    assert squared.name == "time_over_layers____heads_"


def test_only_what_is_marked_is_rewritten() -> None:
    results_file = module("results_file")
    once = results_file.rewritten(SAMPLE, "step", "new\nlines\n")
    assert once == SAMPLE.replace("old", "new\nlines")
    assert results_file.rewritten(once, "step", "old") == SAMPLE
    assert results_file.part_of(once, "step").strip() == "new\nlines" and not results_file.part_of(once, "x")
    added = results_file.rewritten(SAMPLE, "other", "more")
    assert added == SAMPLE + "\n## other\n\n<!-- generated: other -->\nmore\n<!-- end: other -->\n"
    top = results_file.rewritten(SAMPLE, "summary", "all", at_top=True)
    assert top.startswith(
        "# Results\n\n<!-- generated: summary -->\nall\n<!-- end: summary -->\n\nWritten by"
    )
    assert results_file.rewritten(top, "summary", "all", at_top=True) == top


@pytest.mark.parametrize("broken", ["<!-- end: step -->", "<!-- generated: step -->"])
def test_marks_that_do_not_match_are_refused(broken: str) -> None:
    results_file = module("results_file")
    with pytest.raises(ValueError, match="the marks of step"):
        results_file.rewritten(SAMPLE.replace(broken, ""), "step", "new")


def test_the_summary_has_every_target_and_keeps_old_rows() -> None:
    run, common = module("run"), module("common")
    slow = common.Aim("tiny LLaVA, bf16", ">= 2.5 times", "100 ms, 2.0 times", "200 ms", False)
    found = {"step": common.Result("here", [], [slow]), "startup": "took longer than 9 s"}
    text = run.summary(found, quick=True, before="1.0")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(run.TARGETS)
    assert sum("| missed |" in row for row in rows) == 1
    assert sum("took longer than 9 s | " in row for row in rows) == 2
    whole = module("results_file").rewritten("# Results\n", "summary", text, at_top=True)
    later = run.summary({"startup": common.Result()}, quick=False, before="1.0", old=whole)
    assert "100 ms, 2.0 times" in later and "took longer" not in later


def test_the_parts_have_all_targets() -> None:
    run = module("run")
    assert {start for part in run.PARTS.values() for start in part.targets} == set(run.TARGETS)


@pytest.mark.parametrize("name", list(importlib.import_module("run").PARTS))
def test_every_script_takes_its_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = module("run").PARTS[name]
    script = module(part.script.removesuffix(".py"))
    for quick in (False, True):
        monkeypatch.setattr(sys, "argv", [part.script, *part.arguments(quick), "--json", "x", "--help"])
        with pytest.raises(SystemExit) as end:
            script.main()
        out = capsys.readouterr().out
        assert end.value.code == 0 and "--json FILE" in out
        options = [word for word in part.arguments(quick) if word.startswith("--")]
        assert [option for option in options if option not in out] == []


def test_a_part_that_runs_and_one_that_fails(tmp_path: Path) -> None:
    run, common = module("run"), module("common")
    found = run.start(run.Part("packing.py", ["--help"], None, 60), False, 60, tmp_path)
    assert isinstance(found, str)  # it ended well, but without a result
    found = run.start(run.Part("startup.py", ["--wrong"], None, 60), False, 60, tmp_path)
    assert isinstance(found, str) and "unrecognized arguments" in found
    section = run.section(
        common.Result("here", [common.Table("t", ["a"], [["1"]])], pictures=["p.svg"]), True, 3
    )
    assert "a quick run" in section and "| 1 |" in section and "(pictures/p.svg)" in section
