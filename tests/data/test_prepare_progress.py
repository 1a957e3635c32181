"""What `megamm prepare` says of its progress."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megamm.data import prepare_progress
from megamm.data.formats import Chunk
from megamm.data.prepare_progress import ProgressDisplay


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    for number, size in enumerate((300, 100, 600)):
        (tmp_path / str(number)).write_bytes(bytes(size))
    return [tmp_path / str(number) for number in range(3)]


def test_lines_tell_rate_and_time_left(
    sources: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of the second source is read after 10 seconds: 35 %."""
    clock = [1000.0]
    monkeypatch.setattr(prepare_progress.time, "monotonic", lambda: clock[0])
    chunks = [Chunk(str(path), number, None) for number, path in enumerate(sources)]
    with ProgressDisplay(sources, shown=True) as display:
        clock[0] += 31  # hashing and starting, which do not count
        display.update(50)
        with open(sources[1], "rb") as file:
            watched = display.watch(chunks)
            next(watched), next(watched)
            file.seek(50)
            clock[0] += 10
            display.update(60)  # too soon after the last line
            clock[0] += 25
            display.update(750)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "prepare: 50 samples, 0 samples/s",
        "prepare: 750 samples, 20 samples/s, 35 %, 0:01:05 left",
    ]


def test_nothing_is_said_unless_asked(sources: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressDisplay(sources, shown=False) as display:
        display.update(1)
        display.stage("x")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(
    sources: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(prepare_progress, "BAR_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with ProgressDisplay(sources, shown=True) as display:
        list(display.watch([Chunk(str(sources[1]), 1, None)]))
        display.stage("indexing")
        display.update(10)
        display.update(4321)
    said = capsys.readouterr().err
    assert re.search(r"4321 samples", said) and "samples/s" in said
