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
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Aim, Result, Table, cpu_name, last_line, load, quiet_environment, run_limited
from results_file import part_of, rewritten

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
PICTURES = "{pictures}"  # in arguments: the folder of the pictures


@dataclass(frozen=True)
class Part:
    """A benchmark.

    Attributes:
        script: in this folder.
        full, quick: its arguments; without quick ones it is left out of quick runs.
        limit: seconds of the full run; the quick one has QUICK_LIMIT.
        threads: that its process and its children have, unless they say otherwise.
        targets: of the summary: words that its aims begin with, for those that are missing.
    """

    script: str
    full: Sequence[str]
    quick: Sequence[str] | None
    limit: int
    threads: int = 1
    targets: Sequence[str] = ()

    def arguments(self, quick: bool) -> Sequence[str]:
        """Of this run."""
        return (self.quick or ()) if quick else self.full


QUICK_LIMIT, MINUTES = 90, 20
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
        ["--rounds", "4", "--ranks", "1"],
        ["--rounds", "1", "--ranks", "1", "--small"],
        200, 1, ["checkpoint save", "training stands still"],
    ),
    "step": Part(
        "step.py",
        ["--sizes", "tiny", "--rounds", "5"],
        ["--sizes", "tiny", "--cases", "alignment", "--rounds", "1"],
        240, 2, ["tiny LLaVA"],
    ),
    "step_100m": Part(
        "step.py", ["--sizes", "100m", "--cases", "alignment", "finetuning", "--rounds", "1"], None, 240, 2
    ),
    "generation": Part(
        "generation.py",
        ["--sizes", "100m", "--prompts", "64", "512", "--dtype", "fp32", "--rounds", "2"],
        ["--sizes", "tiny", "--prompts", "64", "--dtype", "fp32", "--rounds", "1"],
        180, 2, ["generation with a cache"],
    ),
    "frozen_parts": Part("frozen_parts.py", ["--rounds", "3"], None, 120, 2),
    "scale": Part(
        "scale.py", ["--out", PICTURES, "--rounds", "1"],
        ["--out", PICTURES, "--rounds", "1", "--quick", "--only", "layers", "datasets"], 240, 2,
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
    "generation with a cache": ">= 1 times transformers",
    "start-up: import megamm": "<= 0.15 s",
    "start-up: megamm --help": "<= 0.4 s",
}


def start(part: Part, quick: bool, limit: float, pictures: Path) -> Result | str:
    """What a benchmark found, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        given = [str(pictures) if word == PICTURES else word for word in part.arguments(quick)]
        command = [sys.executable, str(HERE / part.script), *given, "--json", str(answer)]
        status, output = run_limited(command, quiet_environment(part.threads), limit)
        if status is None:
            return f"took longer than {limit:.0f} s"
        return Result.read(answer) if status == 0 and answer.exists() else last_line(output)


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


COLUMNS = ["what", "target", "found", "peer", "verdict", "date"]


def summary(found: Mapping[str, Result | str], quick: bool, before: str, old: str = "") -> str:
    """Every target of the CPU in a table.

    Args:
        before: load before the run.
        old: the text that has the table of an earlier run, whose rows stay for parts that did not run.
    """
    table, today = Table("", COLUMNS), datetime.date.today().isoformat()
    for name, part in PARTS.items():
        for start_of in part.targets:
            if name not in found and (kept := _rows(old, start_of)):
                table.rows += kept
                continue
            for aim in _aims(found.get(name), start_of):
                table.add(aim.what, aim.target, aim.found, aim.peer, aim.verdict, today)
    how = "quick run, " if quick else ""
    return f"{how}{today}, {cpu_name()}, load before {before}, after {load()}.\n\n{table.markdown()}"


def _aims(result: Result | str | None, start_of: str) -> list[Aim]:
    """Those that begin so, or one that says why there is none."""
    if isinstance(result, Result):
        found = [aim for aim in result.aims if aim.what.startswith(start_of)]
        return found or [Aim(start_of, TARGETS[start_of], "not found", "", None)]
    return [Aim(start_of, TARGETS[start_of], result or "not in this run", "", None)]


def _rows(text: str, start_of: str) -> list[list[str]]:
    """Rows of the summary in a text that begin so."""
    rows = [line.strip().strip("|").split("|") for line in part_of(text, "summary").splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == len(COLUMNS)]
    return [row for row in cells if row[0].startswith(start_of)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that is rewritten")
    parser.add_argument("--dry-run", action="store_true", help="print what would run")
    args = parser.parse_args()
    chosen = [name for name in args.only if not args.quick or PARTS[name].quick is not None]
    limits = {name: float(QUICK_LIMIT if args.quick else PARTS[name].limit) for name in chosen}
    if args.dry_run:
        for name in chosen:
            words = " ".join([PARTS[name].script, *PARTS[name].arguments(args.quick)])
            print(f"{name}: {words} ({limits[name]:.0f} s)")
        return 0
    pictures, before = args.results.parent / "pictures", load()
    pictures.mkdir(exist_ok=True)
    found: dict[str, Result | str] = {}
    text = args.results.read_text() if args.results.exists() else "# Results of the benchmarks\n"
    ends = time.monotonic() + 60 * MINUTES
    for name in chosen:
        started = time.monotonic()
        limit = min(limits[name], ends - started)
        up = f"the {MINUTES} minutes are over"
        result = found[name] = start(PARTS[name], args.quick, limit, pictures) if limit > 0 else up
        seconds = time.monotonic() - started
        failed = f"FAILED: {result}" if isinstance(result, str) else "done"
        print(f"{name}: {seconds:.0f} s, {failed}", flush=True)
        if isinstance(result, Result):
            text = rewritten(text, name, section(result, args.quick, seconds))
    text = rewritten(text, "summary", summary(found, args.quick, before, text), at_top=True)
    args.results.write_text(text)
    return 1 if any(isinstance(result, str) for result in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
