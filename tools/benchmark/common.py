"""What the benchmarks share: turns and medians, the machine, tables, and results that `run.py` reads.

Nothing here imports torch: `startup.py` measures what importing costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
CORES = 2  # that the targets are for

Value = TypeVar("Value")


# --- turns ------------------------------------------------------------------------------------------------


def turns(sides: Mapping[str, Callable[[], Value]], rounds: int, warm_up: int = 1) -> dict[str, list[Value]]:
    """What each side returns, round by round: all in turn, every second round in the other order. The first
    `warm_up` rounds do not count."""
    found: dict[str, list[Value]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name in sides if turn % 2 == 0 else reversed(sides):  # type: ignore[call-overload]
            value = sides[name]()
            if turn >= warm_up:
                found[name].append(value)
    return found


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call by the clock."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def timed(sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of a call of each side, in `turns`."""
    clocks = {name: _clock(side) for name, side in sides.items()}
    return {name: statistics.median(times) for name, times in turns(clocks, rounds, warm_up).items()}


def _clock(side: Callable[[], object]) -> Callable[[], float]:
    return lambda: seconds_of(side)


# --- the machine ------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine() -> str:
    """Processor, cores that may be used, versions."""
    cores = len(os.sched_getaffinity(0))
    versions = f"Python {platform.python_version()}"
    if torch := sys.modules.get("torch"):
        versions += f", torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"{cpu_name()}, {cores} cores, {versions}"


def load() -> str:
    """Processes that were ready to run, on average over the last 1, 5 and 15 minutes."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def quiet_environment(threads: int = 1) -> dict[str, str]:
    """This environment for a process of its own: this working tree's code, so many threads."""
    own = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    count = str(threads)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, own)),
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }


def run_limited(
    command: Sequence[str], environment: Mapping[str, str], limit: float
) -> tuple[int | None, str]:
    """(exit status, what it printed) of a process; None where the time was up, and with it all that it
    started."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            list(command), env=dict(environment), stdout=output, stderr=output, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where this process is told to stop
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return status, output.read()


# --- results ----------------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table as it is printed: every cell is text."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: object) -> None:
        """A row of as many cells as there are columns."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{self.title}: {len(cells)} cells for {len(self.columns)} columns")
        self.rows.append([str(cell) for cell in cells])

    def markdown(self) -> str:
        """Title, table, note."""
        lines = [self.title, ""] if self.title else []
        lines += [f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(lines + (["", self.note] if self.note else [])) + "\n"


@dataclass
class Aim:
    """What one row of the targets says, and what was found.

    Attributes:
        what: is measured.
        target, found, peer: in words; `found` and `peer` with their units.
        met: None where this run cannot tell.
    """

    what: str
    target: str
    found: str
    peer: str
    met: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return "not measured" if self.met is None else "reached" if self.met else "missed"


@dataclass
class Result:
    """What a benchmark found.

    Attributes:
        setting: sizes, threads, rounds: what the numbers hold for.
        pictures: file names of SVGs in the folder that it was given.
        values: numbers for other programs.
    """

    setting: str = ""
    tables: list[Table] = field(default_factory=list)
    aims: list[Aim] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """For people."""
        lines = [f"{self.setting}\n"] if self.setting else []
        lines += [table.markdown() for table in self.tables]
        lines += [f"{aim.what}: target {aim.target}, found {aim.found}: {aim.verdict}" for aim in self.aims]
        return "\n".join(lines)

    def write(self, path: Path | None) -> None:
        """As JSON, where a path was given."""
        if path is not None:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote."""
        raw = json.loads(path.read_text())
        raw["tables"] = [Table(**table) for table in raw["tables"]]
        raw["aims"] = [Aim(**aim) for aim in raw["aims"]]
        return cls(**raw)


def parser_of(doc: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the module's docstring, `--json` and, where a benchmark has turns, `--rounds`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_json(parser)
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help="turns of each side (median)")
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option by which `run.py` gets at the result."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")


def milliseconds(seconds: float) -> str:
    """With as many digits as mean something."""
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def last_line(text: str, most: int = 200) -> str:
    """Of what a process printed, to say why it failed."""
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1][:most] if lines else "no output"
