#!/usr/bin/env python
"""How full packed rows are, and what packing costs, on lengths as in LLaVA's instruction data.

    python tools/benchmark/packing.py [--json FILE]

Rows of 4096 positions; every step uses the next samples without gaps. Times are those of the processor.
"""

from __future__ import annotations

import time

import numpy as np
from common import Aim, Result, Table, machine, parser_of
from step_sizes import WITH_IMAGE, text_lengths

from megamm.data.packing import pack_prefix

CAPACITY, TARGET, ENOUGH_ROWS = 4096, 98.0, 32
OURS = "megamm"


def next_fit(lengths: np.ndarray, capacity: int) -> float:
    """Share of positions in use if each sample goes into the row before it or a new one."""
    rows, room = 1, capacity
    for length in lengths.tolist():
        if length > room:
            rows, room = rows + 1, capacity
        room -= length
    return float(lengths.sum()) / (rows * capacity)


def best_fit(lengths: np.ndarray, capacity: int) -> float:
    """... if each sample goes into the fullest row that has room, of all rows so far."""
    rooms: list[int] = []
    for length in lengths.tolist():
        fitting = [(room, row) for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(capacity - length)
    return float(lengths.sum()) / (len(rooms) * capacity)


def packed(lengths: np.ndarray, images: np.ndarray, num_rows: int) -> tuple[float, float]:
    """(share of the positions in use, microseconds for each sample) of steps of so many rows."""
    used = steps = start = 0
    seconds = 0.0
    while start + 8 * num_rows < len(lengths):
        end = start + 8 * num_rows
        started = time.process_time()
        rows = pack_prefix(lengths[start:end], images[start:end], num_rows, CAPACITY, 16)
        seconds += time.process_time() - started
        taken = sorted(sample for row in rows for sample in row)
        assert taken == list(range(len(taken))), "a step uses the next samples without gaps"
        assert all(lengths[start:end][row].sum() <= CAPACITY for row in rows)
        used += int(lengths[start : start + len(taken)].sum())
        start, steps = start + len(taken), steps + 1
    return used / (steps * num_rows * CAPACITY), 1e6 * seconds / start


def measure(count: int = 40_000, sizes: tuple[int, ...] = (8, 16, 32, 64, 128, 256)) -> tuple[Table, Aim]:
    """The table of all rules, and the aim."""
    draw = np.random.default_rng(0)
    images = (draw.random(count) < WITH_IMAGE).astype(np.int64)
    lengths = np.minimum(text_lengths(draw, len(images)) + 575 * images, CAPACITY)
    title = (
        f"Packing: samples of {lengths.mean():.0f} positions on average (94 % with an image of 576), rows of "
        f"{CAPACITY}"
    )
    table = Table(title, ["rule", "% of the positions in use", "us per sample"])
    to_longest = 100 * lengths.sum() / (8 * lengths.reshape(-1, 8).max(axis=1).sum())
    table.add("none: 8 rows as long as the longest of them", f"{to_longest:.1f}", "")
    others = {}
    for name, rule in (("next fit", next_fit), ("best fit, every row open to the end", best_fit)):
        others[name] = 100 * rule(lengths[:10_000], CAPACITY)
        table.add(name, f"{others[name]:.1f}", "")
    shares = {}
    for num_rows in sizes:
        share, each = packed(lengths, images, num_rows)
        shares[num_rows] = 100 * share
        table.add(f"{OURS}, {num_rows} rows per step", f"{100 * share:.1f}", f"{each:.0f}")
    rows = ENOUGH_ROWS if ENOUGH_ROWS in shares else max(shares)
    peers = f"to the longest {to_longest:.1f} %, " + ", ".join(f"{n} {s:.1f} %" for n, s in others.items())
    found = f"{shares[rows]:.1f} % at {rows} rows per step"
    aim = Aim("packing, LLaVA-like lengths, 4096", f">= {TARGET:.0f} %", found, peers, shares[rows] >= TARGET)
    return table, aim


def main() -> None:
    args = parser_of(__doc__).parse_args()
    table, aim = measure()
    result = Result(machine(), [table], [aim])
    print(result.text())
    result.write(args.json)


if __name__ == "__main__":
    main()
