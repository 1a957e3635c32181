"""How far an evaluation is, where nobody watches a terminal."""

from __future__ import annotations

import pytest

from megamm.evaluation.tasks import progress


def test_lines_are_rare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress(total=100, done=20, copies=2) as advance:
        for seconds in (10, 10, 50, 10, 60):
            now[0] += seconds
            advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "evaluate: 100 of 200 questions, 0.9 per second, 2 min left",
        "evaluate: 140 of 200 questions, 0.7 per second, 1 min left",
    ]


def test_the_end_is_not_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.progress(total=8, done=0, copies=1) as advance:
        advance(8)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with progress.progress(total=8, done=2, copies=2) as advance:
        advance(3)
    captured = capsys.readouterr()
    assert "10/16" in captured.err and captured.out == ""
