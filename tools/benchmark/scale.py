#!/usr/bin/env python
"""What grows how fast: step time and memory, datasets, preparation; as exponents of power laws.

    python tools/benchmark/scale.py --out FOLDER [--only layers "hidden size" datasets prepare] [--rounds 3]
                                    [--quick] [--threads 2] [--json FILE]

One size grows and the rest stays as it is: layers, hidden size, positions of a row, images of a sample
(whose row grows along with them), micro-batches. Time is the median of a step (forward, backward, update);
memory is what comes and goes with a step and, where it grows, what weights, gradients and optimizer state
hold between steps. Every point is a process of its own, and every second round goes from large to small.
Datasets have 1e3 to 1e6 samples, written by the project's own writer; reading is random, verified, from the
page cache. `megamm prepare` runs with one worker.

The exponent is that of a least-squares line through the logarithms, with its standard error. What does not
depend on the size that grows makes it smaller, above all at small sizes. --out gets an SVG picture of each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import Result, Table, load, machine, parser_of, turns
from exponents import COLUMNS, Growth
from scale_data import make_tokenizer, opening_seconds, prepare_memory, reading_seconds, write_dataset
from scale_steps import NONE, SWEEPS, Cost, Sweep, apart, measure

from megamm.data.indexed import PreparedDataset

DATASETS, PREPARE = "datasets", "prepare"
DATASET_SIZES = {False: [1_000, 10_000, 100_000, 1_000_000], True: [1_000, 10_000, 100_000]}
PREPARE_SIZES = {False: [4_000, 16_000, 64_000], True: [1_000, 4_000]}


def steps(name: str, sweep: Sweep, args: argparse.Namespace) -> list[Growth]:
    """Time and memory of a step over one size."""
    values = sweep.values[: 3 if args.quick else None]
    shapes = {value: replace(sweep.shape(value), steps=1 if args.quick else 3) for value in values}
    points: dict[str, Callable[[], Cost]] = {
        str(value): partial(apart, measure, shape, args.threads) for value, shape in shapes.items()
    }
    found = turns(points, args.rounds, warm_up=0)

    def growth(of: str, unit: str, expected: tuple[float, float], number: Callable[[Cost], float]) -> Growth:
        ys = [max(statistics.median(map(number, found[str(value)])), 1e-3) for value in values]
        return Growth(of, name, unit, [float(value) for value in values], ys, expected)

    grown = [
        growth("step time", "ms", sweep.time, lambda cost: 1e3 * cost.seconds),
        growth("memory of a step", "MB", sweep.step, lambda cost: cost.step / 1e6),
    ]
    if sweep.held is not None:
        grown.append(growth("memory between steps", "MB", sweep.held, lambda cost: cost.held / 1e6))
    return grown


def datasets(args: argparse.Namespace) -> list[Growth]:
    """Opening and reading over the number of samples."""
    sizes = [float(size) for size in DATASET_SIZES[args.quick]]
    opening, reading = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        tokenizer = make_tokenizer(Path(made) / "tokenizer")
        for size in DATASET_SIZES[args.quick]:
            path = write_dataset(Path(made) / str(size), size, tokenizer)
            opening.append(1e3 * opening_seconds(path, args.rounds))
            dataset = PreparedDataset(path)
            reading.append(1e6 * reading_seconds(dataset, 20 if args.quick else 200, args.rounds))
            dataset.close()
    return [
        # (small files are hashed when it is opened, up to 64 MB of them in all: bounded, but not the same)
        Growth("opening a dataset", "samples", "ms", sizes, opening, (0.0, 0.5)),
        Growth("reading a sample", "samples", "us", sizes, reading, NONE),
    ]


def preparing(args: argparse.Namespace) -> list[Growth]:
    """Memory of `megamm prepare` over its input."""
    sizes, memory = PREPARE_SIZES[args.quick], []
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        make_tokenizer(Path(made) / "tokenizer")
        for size in sizes:
            memory.append(prepare_memory(Path(made), size, Path(made) / "tokenizer") / 1e6)
    xs = [float(size) for size in sizes]
    return [Growth("memory of prepare", "samples", "MB", xs, memory, NONE)]


def run(args: argparse.Namespace) -> Result:
    """All that is asked for; pictures into args.out."""
    table = Table("", COLUMNS)
    result = Result(f"{machine()}, {args.threads} threads; median of {args.rounds}; load {load()}", [table])
    args.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], list[Growth]]] = {
        name: partial(steps, name, sweep, args) for name, sweep in SWEEPS.items()
    }
    parts |= {DATASETS: partial(datasets, args), PREPARE: partial(preparing, args)}
    for name in args.only:
        for growth in parts[name]():
            table.add(*growth.cells())
            print(" | ".join(growth.cells()), flush=True)
            picture = f"{growth.name}.svg"
            (args.out / picture).write_text(growth.picture())
            result.pictures.append(picture)
            result.values[growth.name] = growth.fit.exponent
    return result


def main() -> None:
    names = [*SWEEPS, DATASETS, PREPARE]
    parser = parser_of(__doc__, rounds=3)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where datasets are written (default: the system's)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    result = run(args)
    result.write(args.json)


if __name__ == "__main__":
    main()
