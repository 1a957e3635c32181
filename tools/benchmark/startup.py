#!/usr/bin/env python
"""How long commands take before they do anything: fresh interpreters, by the clock.

    python tools/benchmark/startup.py [--rounds 9] [--slowest 12] [--json FILE]

`import megamm` (target 0.15 s), `megamm --help` (0.4 s) and other commands that need no model, and as peers
what importing torch and megatron-core's GPTModel takes. All take turns, the first round fills the page
cache and the compiled files, every second round goes in the other order; times are medians, what the
interpreter alone needs is listed. Where a target is missed, the imports that took longest are printed (`-X
importtime`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from common import ROOT, Aim, Result, Table, last_line, load, machine, parser_of, quiet_environment, timed

RECIPE = "examples/quickstart/llava.yaml"
PEER = "megatron-core's GPTModel"


@dataclass(frozen=True)
class Start:
    """What is started, and within how many seconds it should have ended (None: nobody has said)."""

    arguments: tuple[str, ...]
    target: float | None = None


def command(*words: str) -> tuple[str, ...]:
    """A command of megamm."""
    return ("-m", "megamm", *words)


STARTS = {
    "python alone": Start(("-c", "pass")),
    "import megamm": Start(("-c", "import megamm"), 0.15),
    "megamm --help": Start(command("--help"), 0.4),
    "megamm score --help": Start(command("score", "--help")),
    "megamm plan": Start(command("plan", RECIPE)),
    "megamm train --print-config": Start(command("train", RECIPE, "--print-config")),
    "import torch": Start(("-c", "import torch")),
    f"import of {PEER}": Start(("-c", "from megatron.core.models.gpt import GPTModel")),
}


def run(start: Start, options: Sequence[str] = ()) -> str:
    """What it wrote to stderr.

    Raises:
        RuntimeError: it failed, with its last line.
    """
    done = subprocess.run(
        [sys.executable, *options, *start.arguments],
        cwd=ROOT,
        env=quiet_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(start.arguments)} ended with {done.returncode}: {last_line(done.stderr)}"
        )
    return done.stderr


def slowest_imports(text: str, count: int) -> Table:
    """The modules that took longest by themselves, from what `-X importtime` prints."""
    rows = []
    for line in text.splitlines():
        fields = line.removeprefix("import time:").split("|")
        if line.startswith("import time:") and fields[0].strip().isdigit():
            rows.append((int(fields[0]), int(fields[1]), fields[2].strip()))
    table = Table("", ["module", "ms by itself", "ms with what it imports"])
    for own, whole, name in sorted(rows, reverse=True)[:count]:
        table.add(name, f"{own / 1e3:.1f}", f"{whole / 1e3:.1f}")
    return table


def measure(rounds: int, slowest: int, names: Sequence[str] = tuple(STARTS)) -> Result:
    """Seconds of every start."""
    chosen = {name: STARTS[name] for name in names}
    found = timed({name: partial(run, start) for name, start in chosen.items()}, rounds)
    table = Table("Fresh interpreters", ["what", "seconds", "target"])
    result = Result(f"{machine()}; median of {rounds} turns; load {load()}", [table], values=dict(found))
    peer = f"import of {PEER}"
    for name, seconds in found.items():
        target = chosen[name].target
        table.add(name, f"{seconds:.3f}", f"<= {target}" if target else "")
        if target is None:
            continue
        met = seconds <= target
        said = f"{peer} {found[peer]:.2f} s" if peer in found else "not measured"
        result.aims.append(Aim(f"start-up: {name}", f"<= {target} s", f"{seconds:.3f} s", said, met))
        if not met:
            worst = slowest_imports(run(chosen[name], ["-X", "importtime"]), slowest)
            worst.title = f"Imports of {name} that took longest"
            result.tables.append(worst)
    return result


def main() -> None:
    parser = parser_of(__doc__, rounds=9)
    parser.add_argument("--slowest", type=int, default=12, help="imports that are listed")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    result = measure(args.rounds, args.slowest)
    print(result.text())
    result.write(args.json)


if __name__ == "__main__":
    main()
