"""Loader processes: the stream is that of a loader without them, whatever happens to them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data import workers
from megamm.data.loader import BatchLoader
from megamm.data.tokenizer import Tokenizer
from megamm.data.workers import Workers, WorkerTraceback
from megamm.errors import InputError, RunError
from tests.data import deadly
from tests.data.helpers import encode, entry, picture, prepared, recipe, varied, write_images
from tests.data.test_loader import AUGMENTED, batches, same, samples

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def varied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path) -> Path:
    return varied(tmp_path_factory.mktemp("varied"), 60, image_folder, tokenizer_dir)


def processes(loader: BatchLoader) -> list[int]:
    assert isinstance(loader._makers, Workers)
    return [worker.process.pid for worker in loader._makers._workers]


def all_same(found: list[Batch], wanted: list[Batch]) -> bool:
    return all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("draws", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_the_stream_does_not_show_them(
    draws: int, varied_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    """Any place of the stream, layout and number of processes, drawn at random."""
    draw = random.Random()
    for number in range(draws):
        ranks = draw.choice([1, 2, 4])
        case = {
            "consumed": 8 * draw.randrange(100),
            "rank": draw.randrange(ranks),
            "ranks": ranks,
        }
        pack, count = bool(number % 2), draw.randint(1, 4)
        print(case, pack, count)
        alone = recipe(varied_dir, tokenizer_dir, image=AUGMENTED, pack=pack)
        helped = recipe(
            varied_dir, tokenizer_dir, image=AUGMENTED, pack=pack, workers=count, prefetch=draw.randint(1, 5)
        )
        assert all_same(batches(helped, tokenizer, 12, **case), batches(alone, tokenizer, 12, **case))


def test_killed_ones_are_replaced(
    varied_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = batches(recipe(varied_dir, tokenizer_dir, image=AUGMENTED), tokenizer, 60)
    settings = recipe(varied_dir, tokenizer_dir, image=AUGMENTED, workers=2, prefetch=1)
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with BatchLoader(settings, tokenizer, 0, 0, 1, None) as loader:
        found = list(islice(loader, 2))
        for victim in (0, 1, 0):
            killed = processes(loader)[victim]
            os.kill(killed, signal.SIGKILL)
            while killed in processes(loader) and len(found) < len(wanted):  # the kernel takes its time
                found += islice(loader, 1)
                time.sleep(0.05)
            assert killed not in processes(loader)
        found += islice(loader, len(wanted) - len(found))
        last = processes(loader)
    assert all_same(found, wanted)
    lines = [line for line in capfd.readouterr().err.splitlines() if "died" in line]
    assert len(lines) == 3 and all(
        line.startswith("megamm: a loader process died (signal 9)") for line in lines
    )
    assert not any(psutil.pid_exists(pid) for pid in last)
    del found, loader
    assert threading.active_count() <= threads and len(os.listdir("/proc/self/fd")) <= files


@pytest.fixture
def one_kills(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """20 samples over 10 pictures, one of which kills the broken decoder of deadly.py."""
    names = write_images(tmp_path / "images", 10)
    (tmp_path / "images" / names[4]).write_bytes(deadly.deadly(picture(4), deadly.KILL))
    entries = [entry(i, names[i % 10], f"Which {i}?", f"This {i}.") for i in range(20)]
    return prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out


def deadly_recipe(monkeypatch: pytest.MonkeyPatch, data: Path, tokenizer_dir: Path, count: int = 2) -> Recipe:
    monkeypatch.setattr(workers, "PROGRAM", deadly.PROGRAM)
    return recipe(data, tokenizer_dir, max_bad_images=1, workers=count)


def test_a_picture_that_kills_is_found_out(
    one_kills: Path,
    tmp_path: Path,
    tokenizer_dir: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """And treated as any bad picture: the stream is the one of a run in which it could not be read."""
    settings = deadly_recipe(monkeypatch, one_kills, tokenizer_dir)
    quarantine = tmp_path / "quarantine.jsonl"
    found = batches(settings, tokenizer, 20, quarantine=quarantine)
    (line,) = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert (line["key"], line["reason"]) == ("4.jpg", "kills the decoder")
    assert line["source"] == str(tmp_path / "images") and line["sample"] in (4, 14)
    assert "the image 4.jpg kills the decoder, it is refused" in capfd.readouterr().err
    # What comes later, and other runs, know it and lose no process.
    again = batches(settings, tokenizer, 10, 20, quarantine=quarantine)
    assert "died" not in capfd.readouterr().err
    settings.data.workers = 0
    assert all_same(again, batches(settings, tokenizer, 10, 20, quarantine=quarantine))
    assert len(quarantine.read_text().splitlines()) == 1
    (tmp_path / "images" / "4.jpg").unlink()
    wanted = batches(settings, tokenizer, 20)
    assert all_same(found, wanted) and all_same(found[10:], again)
    assert sum(batch.num_skipped for batch in found) >= 4 and not {4, 14} & set(samples(found))


@pytest.mark.parametrize("what", [deadly.HANG, deadly.RAISE])
def test_a_worker_that_hangs_or_has_a_defect(
    what: bytes,
    tmp_path: Path,
    tokenizer_dir: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = write_images(tmp_path / "images", 20)
    (tmp_path / "images" / names[4]).write_bytes(deadly.deadly(picture(4), what))
    entries = [entry(i, names[i], "Which?", "This.") for i in range(20)]
    data = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out
    settings = deadly_recipe(monkeypatch, data, tokenizer_dir)
    order = samples(batches(recipe(data, tokenizer_dir), tokenizer, 10))
    good = order.index(4) // 2
    with BatchLoader(settings, tokenizer, 0, 0, 1, None) as loader:
        if good:
            first = list(islice(loader, 1))
        assert isinstance(loader._makers, Workers)
        if what == deadly.HANG:
            while not all(worker.ready for worker in loader._makers._workers):
                time.sleep(0.01)
            loader._makers._timeout_s = 1.0
            named = f"[{order[2 * good]}, {order[2 * good + 1]}]"
            with pytest.raises(RunError, match="busy with the samples") as caught:
                first += list(loader)
            assert named in str(caught.value)
        else:
            with pytest.raises(ZeroDivisionError, match="a defect") as defect:
                first += list(loader)
            assert isinstance(defect.value.__cause__, WorkerTraceback)
            assert "deadly.py" in str(defect.value.__cause__)
        assert processes(loader) == []


def test_errors_for_users_arrive_as_themselves(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_images(tmp_path / "images", 3)
    entries = [entry(i, names[i], "a", "b") for i in range(3)]
    data = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out
    for name in names:
        (tmp_path / "images" / name).unlink()
    settings = recipe(data, tokenizer_dir, workers=1)
    with pytest.raises(RunError, match=r"^.*32 samples in a row have unreadable images"):
        batches(settings, tokenizer, 1)
    with BatchLoader(settings, tokenizer, 0, 0, 1, None) as loader:  # before its worker is that far
        (data / "manifest.json").unlink()
        with pytest.raises(InputError, match="is no prepared dataset"):
            next(loader)
    monkeypatch.setattr(workers, "PROGRAM", "raise SystemExit(7)")
    settings = recipe(
        prepared(tmp_path, [entry(9, None, "a", "b")], tokenizer_dir, [], out="text").out,
        tokenizer_dir,
        workers=1,
    )
    with pytest.raises(RunError, match=r"end while they start \(exit status 7\)"):
        batches(settings, tokenizer, 1)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_they_end_with_their_parent(
    end: signal.Signals, varied_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Ctrl-C goes to the whole group of the parent, and so does SIGKILL here. Nothing stays in /dev/shm."""
    script = textwrap.dedent(f"""
        import signal
        from tests.data.helpers import recipe
        from megamm.data.loader import BatchLoader
        from megamm.data.tokenizer import Tokenizer
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
        settings = recipe({str(varied_dir)!r}, {str(tokenizer_dir)!r}, workers=2)
        with BatchLoader(settings, Tokenizer.load({str(tokenizer_dir)!r}), 0, 0, 1, None) as loader:
            for number, batch in enumerate(loader):
                if number == 10:
                    print(*[worker.process.pid for worker in loader._makers._workers], flush=True)
    """)
    before = set(os.listdir("/dev/shm"))
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 2 and all(psutil.pid_exists(pid) for pid in children)
    os.killpg(parent.pid, end)
    try:
        _, errors = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert parent.returncode != 0
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in children)
    assert set(os.listdir("/dev/shm")) <= before
    assert errors.count("Traceback") <= 1 and "worker.py" not in errors  # the parent's own


def alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_they_import_little() -> None:
    program = "import megamm.data.worker, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"megatron", "transformers", "pytest", "rich", "tensorboard"} & set(found.stdout.split())


def test_deadly_pictures_are_good_ones() -> None:
    """Otherwise the tests above would say nothing."""
    from megamm.data.image_header import read_header

    data = deadly.deadly(picture(1), deadly.KILL)
    assert read_header(data, 10**6).format == "JPEG" and len(data) > len(encode(picture(1), "JPEG"))
