"""The page about a run: sound, alone, complete, whatever the run directory holds."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megamm.cli.entry import main
from megamm.errors import InputError, RunError
from megamm.pages.text import visible
from megamm.report.page import write_report
from megamm.report.samples import BUDGET, STEPS, panels_html, read_panels
from tests.html_walk import Walk
from tests.report.runs import EVIL, row, start, write_panels, write_rows, write_run


def walk(path: Path) -> Walk:
    """The page, which is well-formed, loads nothing and runs nothing but its own script."""
    text, walked = path.read_text(encoding="utf-8"), Walk()
    walked.feed(text)
    walked.close()
    assert walked.open == []
    for tag, attributes in walked.elements:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert "href" not in attributes and tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert str(attributes.get("src", "data:image/jpeg;base64,")).startswith("data:image/jpeg;base64,")
    assert "url(" not in text and "@import" not in text
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    (policy,) = [str(a["content"]) for tag, a in walked.elements if tag == "meta" and "http-equiv" in a]
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert len([tag for tag, _ in walked.elements if tag == "script"]) in (0, 2) and len(scripts) < 2
    return walked


def all_text(page: Walk) -> str:
    return "\n".join(text for _, text in page.texts)


def numbers(path: Path) -> dict[str, Any]:
    """What the script of the page reads values from."""
    found = re.search(r'id="numbers">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def titles(page: Walk) -> list[str]:
    return [str(a["aria-label"]) for tag, a in page.elements if tag == "section" and "aria-label" in a]


def test_everything_is_there_and_hostile_text_stays_text(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "p.html"
    write_report(run, out)
    page = walk(out)
    text = all_text(page)
    names = ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Use of the devices"]
    assert titles(page) == [f"{name} by step" for name in [*names, "Seconds per step", "Waiting for data"]]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    parts = ["data", "incidents", "checkpoints", "starts", "events", "recipe"]
    assert ids == ["curves", "numbers", "samples", *parts]
    assert "finished: 300 steps" in text and "best 2.7 at step 300" in text
    assert text.count(visible(EVIL)) >= 8  # name, question, quarantine, hosts, command, warning, ...
    assert "60 pictures in quarantine.jsonl; the first 50:" in text and "49.png" in text
    assert "50.png" not in text
    assert "51 rows in incidents.jsonl; the last 50:" in text and "slow rank" in text
    assert visible(f"50: {EVIL}") in text and visible(f"0: {EVIL}") not in text.split("\n")
    assert "2 samples were replaced" in text
    assert text.count("3 MiB") == 2 and text.count("complete") == 2 and text.count("newest") == 1
    assert "torch 2.10" in text and "4711" in text and "0123456789ab+" in text
    assert f"NCCL_DEBUG {visible(EVIL)}" in text
    assert "step   1/300" not in text and "resumed at step 100" in text
    assert [t.strip() for t in page.of_class("warning")] == [visible(f"warning: {EVIL}")]
    assert f"{(100 * 4 + 200 * 8) * 2 / 3600:.3f} device hours" in text
    predictions = [t for t in text.split("\n") if t.startswith("said at")]
    assert predictions == ["said at 200", "said at 100"] * 2  # of two panels, newest first
    assert len([tag for tag, _ in page.elements if tag == "img"]) == 1


def test_the_numbers_are_those_of_the_run(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "p.html"
    write_report(run, out)
    found = numbers(out)
    loss, mfu = found["charts"][0], found["charts"][4]
    assert found["first"] == found["last"] == list(range(1, 301))
    assert loss["lines"][0]["mean"][99] == pytest.approx(2 + 4 * math.exp(-2), rel=1e-4)
    assert loss["dots"] == [[100, 2.9], [200, 2.8], [300, 2.7]]
    assert (mfu["lines"][0]["mean"][0], mfu["lines"][1]["mean"][0]) == (40.0, 50.0)
    assert [line["name"] for line in mfu["lines"]] == ["MFU", "HFU"]


def test_a_long_run_is_a_small_page_that_loses_no_spike(tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run", total=30_000), tmp_path / "p.html"
    rows = [row(step, grad_norm=77.0 if step == 12_345 else 0.5) for step in range(1, 20_001)]
    write_rows(run / "metrics.jsonl", rows)
    write_report(run, out)
    assert out.stat().st_size < 500_000
    found = numbers(out)
    assert len(found["last"]) == 480 and found["last"][-1] == 20_000
    norm = found["charts"][2]["lines"][0]
    bucket = next(k for k, last in enumerate(found["last"]) if last >= 12_345)
    assert norm["high"][bucket] == 77.0 and norm["low"][bucket] == 0.5 < norm["mean"][bucket] < 3
    text = all_text(walk(out))
    assert "at step 20,000 of 30,000" in text and "highest 77 at step 12,345" in text
    assert "cut off" in text and "5:33:20" in text  # 10,000 steps of 2 s are left


def just_begun(run: Path) -> str:
    for name in ("metrics.jsonl", "validation.jsonl", "quarantine.jsonl", "incidents.jsonl"):
        (run / name).unlink()
    return "no step yet"


def one_step(run: Path) -> str:
    write_rows(run / "metrics.jsonl", [row(1)])
    return "at step 1 of 300"


def no_validation(run: Path) -> str:
    (run / "validation.jsonl").unlink()
    return "finished"


def diverged(run: Path) -> str:
    rows = [row(step) for step in range(1, 6)]
    write_rows(
        run / "metrics.jsonl", [*rows[:2], row(3, loss=None), *rows[3:], row(6, loss=None, grad_norm=None)]
    )
    return "diverged at step 6 of 300"


def nothing_but_nulls(run: Path) -> str:
    write_rows(run / "metrics.jsonl", [dict.fromkeys(row(1)) | {"step": 1}, {"step": 2, "loss": "x"}])
    return "diverged at step 2"


def cut(run: Path) -> str:
    write_rows(run / "metrics.jsonl", [row(1), row(2), row(2), row(1)], '{"step": 3, "lo')
    return "at step 2 of 300"


def damaged(run: Path) -> str:
    for name in (
        "environment.json",
        "recipe.yaml",
        "quarantine.jsonl",
        "incidents.jsonl",
        "validation.jsonl",
        "log.txt",
    ):
        (run / name).write_bytes(b"{[\xff\x00: -\n")
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "manifest.json").write_text("{}")
    (run / "samples" / "step-00000100" / "samples.json").write_text('[1, {"images": 3}, {}]')
    (run / "samples" / "step-00000200" / "200.jpg").write_bytes(b"no picture")
    return "not a readable manifest"


def odd_types(run: Path) -> str:
    (run / "recipe.yaml").write_text("{training: [1], log: 3, name: [x], parallel: {tensor: a}}")
    odd = start(0) | {"time": 3, "step": "x", "hosts": 1, "git": "g", "versions": [], "variables": None}
    (run / "environment.json").write_text(json.dumps([odd, {}, start(5, time=None)]))
    return "at step 300"


def bare(run: Path) -> str:
    for path in run.iterdir():
        if path.name != "metrics.jsonl" and path.is_file():
            path.unlink()
    return "at step 300"


def half_a_checkpoint(run: Path) -> str:
    (run / "checkpoints" / "step_00000300" / "weights").write_bytes(b"short")
    return "weights: missing or not of the size that was saved"


CASES = [just_begun, one_step, no_validation, diverged, nothing_but_nulls, cut, damaged, odd_types, bare]


@pytest.mark.parametrize("change", [*CASES, half_a_checkpoint], ids=lambda change: change.__name__)
def test_every_run_has_a_page(change: Any, tmp_path: Path) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "p.html"
    said = change(run)
    write_report(run, out)
    page = walk(out)
    assert said in all_text(page)
    assert len(titles(page)) == (0 if change is just_begun else 7)
    text = out.read_text()
    assert "nan" not in re.sub(r"data:image[^\"]*", "", text).lower()
    if change is diverged:
        assert text.count('class="lost"') == 3  # two losses, one gradient
        assert numbers(out)["charts"][0]["lines"][0]["mean"][2] is None


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("empty", "other", "file", "none"):
        with pytest.raises(InputError, match=rf"{name}: (no run has written here|no such directory)"):
            write_report(tmp_path / name, tmp_path / "p.html")
    assert not (tmp_path / "p.html").exists()
    run = write_run(tmp_path / "run")
    with pytest.raises(RunError, match="choose another --out"):
        write_report(run, tmp_path / "none" / "p.html")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}: finished: 300 steps\n"
    walk(run / "report.html")


def test_pictures_come_from_their_step_and_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"")
    panel = {
        "question": "What?",
        "answer": "",
        "prediction": "That.",
        "images": ["../../secret.jpg", "gone.jpg"],
    }
    folder = write_panels(tmp_path, 5, [panel, panel | {"question": "And?", "images": ["a.jpg", "b.jpg"]}])
    (folder / "gone.jpg").unlink()
    for step in range(6, 20):
        write_panels(tmp_path, step, [panel | {"images": []}])
    panels = read_panels(tmp_path / "samples", 8)
    assert [step for step, _ in panels[0].predictions] == [8, 7, 6, 5], "later steps are of an earlier run"
    assert len(read_panels(tmp_path / "samples", 19)[0].predictions) == STEPS
    html = "".join(panels_html(read_panels(tmp_path / "samples", 5)))
    assert "secret.jpg: not a file of this step" in html and "gone.jpg: No such file" in html
    assert html.count("<img") == 2 and len(html) < BUDGET
    monkeypatch.setattr("megamm.report.samples.BUDGET", 100)
    html = "".join(panels_html(read_panels(tmp_path / "samples", 5)))
    assert html.count("<img") == 0 and "the page is large enough" in html
