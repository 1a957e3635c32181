#!/usr/bin/env python
"""All benchmarks of this machine's CPU, one after the other, and RESULTS.md with what they found.

    python tools/benchmark/run.py [--quick] [--only startup step ...] [--results FILE] [--dry-run]

At most 20 minutes, with --quick about 3 (sizes and rounds so small that only large differences mean
something). Every part is a process of its own with a time limit; one that fails is reported, and its old
part of RESULTS.md stays. RESULTS.md is rewritten between `<!-- generated: NAME -->` and `<!-- end: NAME
-->` alone, and gets such a place at its end for a part that has none; what people wrote around them is
kept. On top, under `summary`, every target of the CPU stands with what was found. Pictures go to the folder
`pictures` beside it.

Exit code 1: a part failed.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Aim, Result, Table, cpu_name, last_line, load, quiet_environment
from results_file import rewritten

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
PICTURES = "{pictures}"  # in arguments: the folder of the pictures


@dataclass(frozen=True)
class Part:
    """A benchmark.

    Attributes:
        script: in this folder.
        full, quick: its arguments.
        limit: seconds of the full run; the quick one has QUICK_LIMIT.
        threads: that its process and its children have, unless they say otherwise.
        targets: of the summary: words that its aims begin with, for those that are missing.
    """

    script: str
    full: Sequence[str]
    quick: Sequence[str]
    limit: int
    threads: int = 1
    targets: Sequence[str] = ()


QUICK_LIMIT = 60
# Seconds of the full runs add up to less than 20 minutes.
PARTS: Mapping[str, Part] = {
    "startup": Part(
        "startup.py", ["--rounds", "7"], ["--rounds", "1"], 120, 1,
        ["start-up: import megamm", "start-up: megamm --help"],
    ),
    "packing": Part("packing.py", [], [], 60, 1, ["packing"]),
    "data": Part(
        "data.py",
        ["--only", "documents,samples", "--rounds", "7"],
        ["--only", "documents,samples", "--rounds", "1", "--documents", "4000"],
        90, 1, ["random document read", "training sample"],
    ),
    "images": Part(
        "images.py",
        ["--rounds", "2", "--seconds", "3", "--images", "128"],
        [
            *("--rounds", "1", "--seconds", "0.5", "--images", "32", "--only"),
            *("torch DataLoader + Pillow, 2 workers", "megamm dali, 2 workers"),
        ],
        150, 1, ["JPEG 640 x 480"],
    ),
    "convert": Part(
        "convert.py", ["--rounds", "3"], ["--rounds", "1", "--gigabytes", "0.4"], 120, 1,
        ["HF -> TP2 conversion"],
    ),
    "checkpoint": Part(
        "checkpoint.py",
        ["--rounds", "2", "--ranks", "1"],
        ["--rounds", "1", "--ranks", "1"],
        150, 1, ["checkpoint save", "training stands still"],
    ),
    "step": Part(
        "step.py",
        ["--sizes", "tiny", "100m", "--rounds", "3"],
        ["--sizes", "tiny", "--cases", "alignment", "--rounds", "1"],
        240, 2, ["tiny LLaVA"],
    ),
    "frozen_parts": Part("frozen_parts.py", ["--rounds", "3"], ["--rounds", "1"], 120, 2),
    "scale": Part(
        "scale.py", ["--out", PICTURES, "--rounds", "1"],
        ["--out", PICTURES, "--rounds", "1", "--quick", "--only", "layers", "datasets"], 180, 2,
    ),
}  # fmt: skip
TARGETS = {
    "JPEG 640 x 480": ">= 2 times DataLoader, <= 2/255 off",
    "random document read": ">= 5 times megatron-core when batched",
    "training sample": "<= 10 us",
    "HF -> TP2 conversion": ">= 3 times transformers; <= 2 tensors + 200 MB",
    "checkpoint save": ">= 90 % of raw",
    "training stands still": "<= 10 % of a synchronous save",
    "tiny LLaVA": ">= 2.5 times transformers",
    "packing": ">= 98 %",
    "start-up: import megamm": "<= 0.15 s",
    "start-up: megamm --help": "<= 0.4 s",
}


def start(part: Part, quick: bool, pictures: Path) -> Result | str:
    """What a benchmark found, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        given = [str(pictures) if word == PICTURES else word for word in (part.quick if quick else part.full)]
        command = [sys.executable, str(HERE / part.script), *given, "--json", str(answer)]
        limit = QUICK_LIMIT if quick else part.limit
        try:
            done = subprocess.run(
                command,
                env=quiet_environment(part.threads),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            return f"took longer than {limit} s"
        return Result.read(answer) if answer.exists() else last_line(done.stdout)


def section(result: Result, quick: bool, seconds: float) -> str:
    """The generated part of RESULTS.md of one benchmark."""
    today = datetime.date.today().isoformat()
    how = " (a quick run: only large differences mean something)" if quick else ""
    lines = [f"{today}{how}, {seconds:.0f} s. {result.setting}.", ""]
    lines += [table.markdown() for table in result.tables]
    lines += [
        f"![{name.removesuffix('.svg').replace('_', ' ')}](pictures/{name})" for name in result.pictures
    ]
    return "\n".join(lines)


def summary(found: Mapping[str, Result | str], quick: bool, before: str) -> str:
    """Every target of the CPU in a table."""
    table = Table("", ["what", "target", "found", "peer", "verdict"])
    for name, part in PARTS.items():
        result = found.get(name)
        for start_of in part.targets:
            own = result.aims if isinstance(result, Result) else []
            matching = [aim for aim in own if aim.what.startswith(start_of)]
            why = "not in this run" if result is None else result if isinstance(result, str) else "not found"
            for aim in matching or [Aim(start_of, TARGETS[start_of], why, "", None)]:
                table.add(aim.what, aim.target, aim.found, aim.peer, aim.verdict)
    how = "quick run, " if quick else ""
    today = datetime.date.today().isoformat()
    return f"{how}{today}, {cpu_name()}, load before {before}, after {load()}.\n\n{table.markdown()}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is rewritten")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    args = parser.parse_args()
    if args.dry_run:
        for name in args.only:
            part = PARTS[name]
            limit = QUICK_LIMIT if args.quick else part.limit
            print(f"{name}: {part.script} {' '.join(part.quick if args.quick else part.full)} ({limit} s)")
        return 0
    pictures, before = args.results.parent / "pictures", load()
    pictures.mkdir(exist_ok=True)
    found: dict[str, Result | str] = {}
    text = args.results.read_text() if args.results.exists() else "# Results of the benchmarks\n"
    for name in args.only:
        started = time.monotonic()
        result = found[name] = start(PARTS[name], args.quick, pictures)
        seconds = time.monotonic() - started
        failed = f"FAILED: {result}" if isinstance(result, str) else "done"
        print(f"{name}: {seconds:.0f} s, {failed}", flush=True)
        if isinstance(result, Result):
            text = rewritten(text, name, section(result, args.quick, seconds))
    text = rewritten(text, "summary", summary(found, args.quick, before), at_top=True)
    args.results.write_text(text)
    return 1 if any(isinstance(result, str) for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
