"""Preparing that is killed, interrupted, starved or started twice: the same bytes, or a sentence."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megamm.data import prepare_writer
from megamm.data.prepare import prepare
from megamm.data.prepare_partial import Partial
from megamm.errors import InputError, RunError
from tests.data.helpers import conversations, prepared, use_chunks, write_source, write_tar

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.data.killed_prepare"


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 entries, each in the journal."""
    use_chunks(4, monkeypatch.setattr)
    monkeypatch.setattr(prepare_writer, "JOURNAL_SECONDS", 0.0)


@pytest.fixture
def entries(image_folder: Path) -> list[Any]:
    names = sorted(path.name for path in image_folder.iterdir())
    return conversations([*names, "missing.jpg"], 40)


@pytest.mark.parametrize(
    "rounds", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("tar", [False, True])
def test_killed_at_any_operation(
    rounds: int, tar: bool, entries: list[Any], image_folder: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Up to three times in a row, also while hashing, renaming and tidying up."""
    images = write_tar(tmp_path / "a.tar", image_folder) if tar else image_folder
    source = write_source(tmp_path / "source.json", entries)

    def run(*kills: int) -> dict[str, int]:
        command = [sys.executable, "-m", PROGRAM]
        command += map(str, (source, images, tokenizer_dir, tmp_path / "out"))
        done = subprocess.run(
            [*command, *map(str, kills)], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60
        )
        return json.loads(done.stdout)

    whole = run()
    wanted = contents(tmp_path / "out")
    draw, resumed = random.Random(rounds + tar), 0
    operations = whole["operations"]
    for turn in range(rounds):
        shutil.rmtree(tmp_path / "out")
        if turn < 2:  # near the end, where the directory appears
            kills = [operations - draw.randrange(20)]
        else:
            kills = [draw.randrange(1, operations) for _ in range(draw.randint(1, 3))]
        resumed += run(*kills)["resumed"]
        assert contents(tmp_path / "out") == wanted, kills
        assert not list(tmp_path.glob(".*")), kills
    assert resumed > 0


def test_workers_one_to_three(
    small_chunks: None, entries: list[Any], image_folder: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    reports = [
        prepared(tmp_path, entries, tokenizer_dir, [image_folder], f"out{n}", workers=n) for n in (1, 2, 3)
    ]
    assert reports[0].counts["skipped"] > 0 and reports[0].counts["text_only_samples"] > 0
    assert contents(reports[0].out) == contents(reports[1].out) == contents(reports[2].out)


def slow_command(root: Path, tokenizer: Path, images: Path, workers: int) -> list[str]:
    """The command line, with so much to do that it can be met at work."""
    names = sorted(path.name for path in images.iterdir())
    source = write_source(root / "source.json", conversations(names, 30_000))
    command = [sys.executable, "-m", "megamm", "prepare", str(source), "--format", "llava", "--tokenizer"]
    command += [str(tokenizer), "--images", str(images), "--out", str(root / "out")]
    return [*command, "--workers", str(workers)]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def at_work(process: subprocess.Popen[str], root: Path, workers: int) -> list[int]:
    """Wait until chunks are being written; the children of the process."""
    written = root / ".out.partial" / "dataset" / "tokens.bin"
    wait_until(lambda: process.poll() is not None or (written.exists() and written.stat().st_size > 0))
    assert process.poll() is None, process.communicate()
    found = children(process.pid)
    assert len(found) >= workers
    return found


@pytest.mark.parametrize("end", ["kill", "worker", "interrupt"])
def test_processes_end_together(end: str, image_folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """However it ends, no process stays, and what is written stays."""
    command = slow_command(tmp_path, tokenizer_dir, image_folder, 2)
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed, start_new_session=True
    )
    workers = at_work(process, tmp_path, 2)
    if end == "kill":
        process.kill()
    elif end == "interrupt":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everyone gets it
    else:
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers}
        os.kill(next(pid for pid, line in commands.items() if b"spawn_main" in line), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    codes = {"kill": -signal.SIGKILL, "interrupt": 130, "worker": 1}
    assert process.returncode == codes[end]
    lines = {
        "kill": "",
        "interrupt": "megamm: interrupted\n",
        "worker": "megamm: prepare: a worker process died (signal 9, perhaps memory ran out); run the same "
        "command again, which goes on where this one was, or with fewer --workers\n",
    }
    assert said == lines[end]
    wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists() and not (tmp_path / "out").exists()


def test_a_full_disk(
    small_chunks: None, entries: list[Any], image_folder: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for it: writes are cut short, then fail."""
    for item in entries:
        item["conversations"][1]["value"] *= 50  # the tokens are larger than any file that is written first
    whole = prepared(tmp_path, entries, tokenizer_dir, [image_folder], "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (whole.out / "tokens.bin").stat().st_size
    source, out = tmp_path / "source.json", tmp_path / "out"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2 // 3, before[1]))
        for _ in range(2):
            with pytest.raises(RunError, match=r"out: cannot be written \(File too large\); free or choose"):
                prepare([source], "llava", out, tokenizer_dir, [image_folder], "vicuna", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    assert 0 < again.resumed < 10
    assert contents(again.out) == contents(whole.out)


def test_other_arguments_and_restart(
    small_chunks: None,
    entries: list[Any],
    image_folder: Path,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = prepared(tmp_path, entries, tokenizer_dir, [image_folder], "whole", template="plain")
    real = prepare_writer.DatasetWriter.write

    def stop(writer: prepare_writer.DatasetWriter, piece: Any) -> None:
        if writer.chunks == 5:
            raise KeyboardInterrupt
        real(writer, piece)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_writer.DatasetWriter, "write", stop)
        prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    with pytest.raises(InputError, match=r"\.out\.partial: holds unfinished work .* --restart"):
        prepared(tmp_path, entries, tokenizer_dir, [image_folder], template="plain")
    with monkeypatch.context() as patch:
        patch.setattr("megamm.data.prepare.__version__", "99")
        with pytest.raises(InputError, match="another version"):
            prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    report = prepared(tmp_path, entries, tokenizer_dir, [image_folder], template="plain", restart=True)
    assert report.resumed == 0 and contents(report.out) == contents(wanted.out)


def test_two_at_once(entries: list[Any], image_folder: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    sentence = rf"out: is being prepared by process {os.getpid()} on .*; wait"
    with Partial(tmp_path / "out"), pytest.raises(InputError, match=sentence):
        prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    assert prepared(tmp_path, entries, tokenizer_dir, [image_folder]).counts["samples"] > 0


def test_a_journal_that_lies(
    small_chunks: None, entries: list[Any], image_folder: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """A file that is shorter than the journal says, as after damage to the disk."""
    out = tmp_path / "out"
    with Partial(out) as left:
        left.begin("x", restart=False)
        assert left.begin("x", restart=False).chunks == 0
    with Partial(out) as left:
        done = left.begin("x", restart=False)
        done.chunks, done.sizes = 1, {"tokens.bin": 100}
        left.record(done)
        with pytest.raises(RunError, match=r"is damaged; .*--restart"):
            prepare_writer.DatasetWriter(left, done, 100)
    (left.path / "journal.jsonl").write_bytes((left.path / "journal.jsonl").read_bytes() + b'{"chunks": 2, ')
    with Partial(out) as left:
        assert left.begin("x", restart=False).chunks == 1
