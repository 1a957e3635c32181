#!/usr/bin/env python
"""How fast `megamm prepare` is, in how much memory, and whether it goes on after being killed.

    python tools/benchmark/prepare.py [--samples 1000000] [--workers 1 2] [--kills 2] [--folder /tmp]

Writes synthetic LLaVA conversations over a few hundred small pictures (nine in ten have one) and prepares
them with each number of workers, each run being a process of its own. Memory is the sum of the proportional
set sizes (PSS: pages that are shared count once) of the process and its workers, looked at four times a
second. The outputs must be equal byte by byte, also that of a run that is killed (SIGKILL) at random moments
and started again each time.
"""

from __future__ import annotations

import argparse
import contextlib
import filecmp
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import Result, Table, add_json, load, machine
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PICTURES, VOCAB_SIZE = 300, 4000
INTERVAL_S = 0.25
STARTUP_S = 0.5  # nothing is killed before: it would only show that Python starts

OPENING = """
import json, sys, time, random
from megamm.data.indexed import PreparedDataset
start = time.perf_counter()
dataset = PreparedDataset(sys.argv[1])
opened = time.perf_counter() - start
rows = random.Random(0).choices(range(len(dataset)), k=10_000)
start = time.perf_counter()
for row in rows:
    dataset[row]
print(json.dumps({"opened": opened, "read": len(rows) / (time.perf_counter() - start)}))
"""


# --- the source -----------------------------------------------------------------------------------------


def write_pictures(folder: Path) -> list[str]:
    """Photographs as far as their size is concerned: some 10 KB of JPEG each."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(PICTURES):
        coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((336, 252), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(stream.getvalue())
    return [f"{number}.jpg" for number in range(PICTURES)]


def write_source(path: Path, samples: int, names: list[str]) -> None:
    """A JSON list of conversations of one to three questions."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ing")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(5000)]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most))) + "."

    with open(path, "w") as file:
        for number in range(samples):
            with_image = draw.random() < 0.9
            turns = []
            for turn in range(draw.randint(1, 3)):
                mark = "<image>\n" if with_image and not turn else ""
                turns.append({"from": "human", "value": mark + text(5, 15)})
                turns.append({"from": "gpt", "value": text(5, 60)})
            entry = {"id": f"{number:09}"} | ({"image": draw.choice(names)} if with_image else {})
            file.write(("[" if not number else ",\n") + json.dumps(entry | {"conversations": turns}))
        file.write("]\n")


# --- runs -----------------------------------------------------------------------------------------------


def start(folder: Path, out: Path, tokenizer: Path, workers: int, checks: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "megamm", "prepare", str(folder / "source.json"), "--format", "llava"]
    command += ["--images", str(folder / "images"), "--tokenizer", str(tokenizer), "--out", str(out)]
    command += ["--workers", str(workers), "--image-checks", checks]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL)


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return found


def proportional_bytes(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def watched(process: subprocess.Popen[bytes]) -> tuple[float, int, int]:
    """Seconds that a run takes, its memory after a tenth of the samples of it, and its peak."""
    begin, seen = time.perf_counter(), []
    while process.poll() is None:
        seen.append(proportional_bytes(tree(process.pid)))
        time.sleep(INTERVAL_S)
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"prepare ended with {process.returncode}")
    return seconds, max(seen[: max(1, len(seen) // 10)]), max(seen)


def kill_after(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the run was still at work; raises AssertionError if a worker survives it."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        workers = tree(process.pid)[1:]
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.05)
        return True


def assert_equal(one: Path, two: Path) -> None:
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(two)) for path in two.rglob("*") if path.is_file())
    for name in names:
        assert filecmp.cmp(one / name, two / name, shallow=False), name


def opening(out: Path) -> dict[str, float]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPENING, str(out)], env=env, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def run(args: argparse.Namespace, folder: Path) -> Result:
    names = write_pictures(folder / "images")
    write_source(folder / "source.json", args.samples, names)
    tokenizer = args.tokenizer
    if tokenizer is None:
        from megamm.data.prepare import train_tokenizer_from_sources

        write_source(folder / "few.json", 2000, names)
        tokenizer = folder / "tokenizer"
        train_tokenizer_from_sources([folder / "few.json"], "llava", tokenizer, VOCAB_SIZE, "vicuna")
    size = (folder / "source.json").stat().st_size
    setting = f"{args.samples} samples, {size / 1e6:.0f} MB of JSON, image checks {args.image_checks}"
    columns = ["workers", "samples/s", "seconds", "memory in the first tenth", "at most"]
    result = Result(f"{machine()}; {setting}; load {load()}", [Table("", columns)])
    print(result.setting, flush=True)
    first, seconds = folder / f"out{args.workers[0]}", 0.0
    for workers in args.workers:
        out = folder / f"out{workers}"
        seconds, early, peak = watched(start(folder, out, tokenizer, workers, args.image_checks))
        print(
            f"{workers} workers: {args.samples / seconds:.0f} samples/s ({seconds:.1f} s), "
            f"memory {early / 1e6:.0f} MB in the first tenth, {peak / 1e6:.0f} MB at most",
            flush=True,
        )
        rate, sizes = f"{args.samples / seconds:,.0f}", (f"{x / 1e6:.0f} MB" for x in (early, peak))
        result.tables[0].add(workers, rate, f"{seconds:.1f}", *sizes)
        if out != first:
            assert_equal(first, out)
            shutil.rmtree(out)
    for _ in range(2):  # the second time from the page cache
        found = opening(first)
    opened = (
        f"opening {found['opened'] * 1000:.0f} ms, {found['read']:,.0f} random samples/s read and verified"
    )
    print(opened)
    draw, killed, out = random.Random(args.seed), 0, folder / "killed"
    for _ in range(args.kills):
        wait = draw.uniform(STARTUP_S, max(STARTUP_S, seconds / args.kills))
        killed += kill_after(start(folder, out, tokenizer, args.workers[-1], args.image_checks), wait)
    assert start(folder, out, tokenizer, args.workers[-1], args.image_checks).wait() == 0
    assert_equal(first, out)
    again = f"killed {killed} times and started again: the same bytes"
    print(again)
    result.tables[0].note = f"{opened}; {again}."
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--image-checks", choices=("full", "header", "none"), default="full")
    parser.add_argument("--tokenizer", type=Path, help="default: one of 4000 pieces, trained on the samples")
    parser.add_argument(
        "--folder", type=Path, help="where files are written (default: the system's for such)"
    )
    add_json(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run(args, Path(folder)).write(args.json)


if __name__ == "__main__":
    main()
