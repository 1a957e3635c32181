#!/usr/bin/env python
"""The fused operators against their peers on this machine, forward and backward.

    python tools/benchmark/ops.py [--device cpu] [--only rms_norm,rope] [--dtypes fp32,bf16] [--no-compile]
                                  [--rounds 7] [--picture docs/ops.png]

The peers are plain torch, torch.compile and, where they are installed, Transformer Engine, Liger and
megatron-core's own. All sides get the same inputs and take turns. Outputs and gradients must be those of
plain torch in the next wider type; a peer whose are not is marked. On a CPU the allocator keeps freed memory,
as the page faults of fresh memory would cost more than the operators. Times are those of the fastest turn of
each side: on a machine that is shared, what is slower is somebody else's work. GB/s counts the bytes that
have to move, whatever a side really moves, and is set against a plain copy in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import common
import torch
from common import Table, add_json, cpu_name, load
from op_cases import CASES, Case, Side

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS, EAGER = "megamm", "eager"
_SECONDS_PER_TURN = 0.15


@dataclass
class Row:
    """One side of one case: seconds of its fastest turn."""

    side: str
    forward: float = math.inf
    both: float = math.inf
    note: str = ""


@dataclass
class Result:
    """All sides of one case."""

    case: Case
    dtype: str
    rows: list[Row] = field(default_factory=list)

    def of(self, side: str) -> Row:
        return next(row for row in self.rows if row.side == side)


# --- clocks ---------------------------------------------------------------------------------------------


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds of one call, on average over as many as fill a turn."""
    if device == "cpu":
        started = time.perf_counter()
        run()
        count = max(1, int(_SECONDS_PER_TURN / (time.perf_counter() - started)))
        started = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - started) / count
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    torch.cuda.synchronize()
    start.record()
    for _ in range(_GPU_CALLS):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / _GPU_CALLS


_GPU_CALLS = 20


def copy_bandwidth(num_bytes: int, device: str) -> float:
    """Bytes per second of a plain copy of that many bytes, read and written."""
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).uniform_()
    target = torch.empty_like(source)
    fastest = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() * 4 / fastest


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the system."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


# --- one case -------------------------------------------------------------------------------------------


def measure(case: Case, dtype: torch.dtype, device: str, rounds: int, compiled: bool) -> Result:
    """Time all sides of a case in turns."""
    sides = case.sides(dtype, device)
    if compiled and EAGER in sides and not case.no_compile:
        torch._dynamo.reset()
        sides = {**sides, "compile": torch.compile(sides[EAGER])}
    inputs = case.inputs(dtype, device)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    wanted = outputs_and_gradients(case.sides(wider, device)[EAGER], _widened(inputs, wider), case)
    result = Result(case, next(name for name, value in DTYPES.items() if value == dtype))
    working = {}
    for name, side in sides.items():
        row = Row(name)
        result.rows.append(row)
        try:
            found = outputs_and_gradients(side, inputs, case)
        except Exception as error:
            row.note = f"does not run: {str(error).strip().splitlines()[0][:60]}"
            continue
        error = largest_error(found, wanted)
        if error > _TOLERANCES[dtype]:
            assert name != OURS, (case.name, dtype, error)
            row.note = f"(off by {error:.0%} of the largest number)"
        working[name] = side
    del wanted
    for turn in range(rounds):
        order = list(working)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            side, row = working[name], result.of(name)
            row.forward = min(row.forward, seconds_of(lambda side=side: case.call(side, inputs), device))
            row.both = min(
                row.both,
                seconds_of(lambda side=side: outputs_and_gradients(side, inputs, case), device),
            )
    return result


def outputs_and_gradients(side: Side, inputs: Sequence[torch.Tensor], case: Case) -> list[torch.Tensor]:
    outputs = case.call(side, inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, case.gradients(outputs))
    return [*(output.detach() for output in outputs), *gradients]


def largest_error(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference of any output or gradient, as a share of its largest number."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def _widened(inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]


# --- the report -----------------------------------------------------------------------------------------


def table_of(results: list[Result], bandwidth: float) -> Table:
    """All sides of all cases."""
    columns = ["op", "shape", "dtype", "side", "forward us", "backward us", "both us"]
    columns += ["GB/s forward", "GB/s backward", "% of copy", "eager / side"]
    table = Table(f"plain copy: {bandwidth / 1e9:.1f} GB/s", columns)
    for result in results:
        case, size = result.case, DTYPES[result.dtype].itemsize
        eager = result.of(EAGER)
        for row in result.rows:
            start = case.name, case.shape, result.dtype, f"{row.side} {row.note}".strip()
            if row.both == math.inf:
                table.add(*start, *[""] * 7)
                continue
            backward = max(row.both - row.forward, 1e-9)
            forward_rate = case.forward_elements * size / row.forward
            backward_rate = case.backward_elements * size / backward
            rate = (case.forward_elements + case.backward_elements) * size / row.both
            micros = (f"{seconds * 1e6:,.0f}" for seconds in (row.forward, backward, row.both))
            rates = (f"{value / 1e9:,.1f}" for value in (forward_rate, backward_rate))
            ratio = f"{eager.both / row.both:.2f}"
            table.add(*start, *micros, *rates, f"{100 * rate / bandwidth:.0f}", ratio)
    return table


def draw(results: list[Result], path: Path, machine: str) -> None:
    """Bars: how many times as fast as plain torch, forward and backward together."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [f"{r.case.name}, {r.case.shape}, {r.dtype}" for r in results]
    sides = list(dict.fromkeys(row.side for r in results for row in r.rows if row.side != EAGER))
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(names) + 1.2))
    height = 0.8 / max(1, len(sides))
    for number, side in enumerate(sides):
        rows = [(index, r, row) for index, r in enumerate(results) for row in r.rows if row.side == side]
        found = [(index, r.of(EAGER).both / row.both) for index, r, row in rows]
        places = [index + (number - (len(sides) - 1) / 2) * height for index, _ in found]
        axes.barh(places, [ratio for _, ratio in found], height, label=side)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as eager torch, forward and backward together")
    axes.set_title(machine, fontsize=9)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine_name(device: str) -> str:
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="operators, separated by commas")
    parser.add_argument("--dtypes", help="of fp32, bf16, fp16 (default: fp32,bf16 on a CPU, bf16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out (it takes a while)"
    )
    parser.add_argument("--picture", type=Path)
    add_json(parser)
    args = parser.parse_args()
    if args.picture and importlib.util.find_spec("matplotlib") is None:
        parser.error("--picture needs matplotlib (pip install matplotlib)")
    torch.manual_seed(0)
    keep_freed_memory()
    dtypes = (args.dtypes or ("fp32,bf16" if args.device == "cpu" else "bf16")).split(",")
    print(f"{machine_name(args.device)}; load {load()}")
    bandwidth = copy_bandwidth(256 << 20, args.device)
    results = []
    for case in CASES(args.device):
        if args.only and case.name.partition(",")[0] not in args.only.split(","):
            continue
        for name in dtypes:
            results.append(measure(case, DTYPES[name], args.device, args.rounds, not args.no_compile))
    found = common.Result(f"{machine_name(args.device)}; load {load()}", [table_of(results, bandwidth)])
    print(found.tables[0].markdown())
    found.write(args.json)
    if args.picture:
        draw(results, args.picture, machine_name(args.device))


if __name__ == "__main__":
    main()
