#!/usr/bin/env python
"""The experiments on one GPU whose targets PERFORMANCE.md sets, with the ceilings of the same run, in ten
minutes.

    python tools/benchmark/gpu.py --out FOLDER [--only alignment flamingo] [--seconds 590] [--json FILE]
    python tools/benchmark/gpu.py --out FOLDER --dry-run        on a CPU: what would run, and the same code,
    tiny

ceilings: a plain copy, matrix products of 8192 in bf16 and FP8.
operators: the fused operators against the copy, and against Transformer Engine, Liger and megatron-core
    where they are installed (`ops.py`).
fused loss: output layer and cross entropy at once, 16k tokens, 32k words: time, memory beyond inputs and
gradients.
alignment: LLaVA-1.5 of 7B, language model frozen, packed rows.
flamingo: 7B, gated blocks before every fourth layer and a resampler trained, packed, against plain PyTorch
    with a dense mask and padded rows, on the same weights and samples; loss and one gradient must be equal.
finetuning: all of the 7B language model trained, nothing recomputed.
bf16 layers, fp8 layers: two layers of LLaMA-65B's shape in a LLaVA, by Transformer Engine; left out where
    FP8 does not work.

Each experiment is a process of its own with a time limit; one that fails does not stop the next.
results.jsonl has a line for each, results.md the table. Exit code 1: one failed; 2: there is no GPU."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Aim, Result, Table, last_line, load, machine, parser_of, quiet_environment, run_limited

Found = dict[str, Any]
# Seconds of each, the model's making included; on an H200 most end much earlier.
LIMITS = {
    "ceilings": 40,
    "operators": 110,
    "fused loss": 40,
    "alignment": 80,
    "flamingo": 110,
    "finetuning": 100,
    "bf16 layers": 60,
    "fp8 layers": 60,
}
FP8 = "fp8 layers"
DRY_LIMIT = 180


def start(name: str, tiny: bool, limit: float, out: Path) -> Found:
    """What an experiment in a process of its own found; {"error": why} where it failed."""
    answer = out / f"{name.replace(' ', '_')}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--out", str(out), "--one", name, *(["--tiny"] if tiny else [])]
    status, output = run_limited(command, quiet_environment(2 if tiny else 8), limit)
    (out / f"{name.replace(' ', '_')}.log").write_text(output)
    if status is None:
        return {"error": f"took longer than {limit:.0f} s"}
    if status or not answer.exists():
        return {"error": last_line(output)}
    found: Found = json.loads(answer.read_text())
    return found


def run(args: argparse.Namespace, tiny: bool) -> dict[str, Found]:
    """All experiments that are asked for, one after the other."""
    ends, found = time.monotonic() + args.seconds, {}
    with open(args.out / "results.jsonl", "w") as lines:
        for name in args.only:
            left = ends - time.monotonic()
            limit = min(DRY_LIMIT if tiny else LIMITS[name], left)
            reason = left_out(name, left, tiny)
            started = time.monotonic()
            found[name] = {"left out": reason} if reason else start(name, tiny, limit, args.out)
            found[name]["seconds"] = round(time.monotonic() - started, 1)
            lines.write(json.dumps({"experiment": name, **found[name]}) + "\n")
            lines.flush()
            print(f"{name}: {summary(found[name])}", flush=True)
    return found


def left_out(name: str, left: float, tiny: bool) -> str:
    """Why an experiment does not run; empty if it does."""
    if left < 20:
        return "the time is up"
    if name == FP8:
        from gpu_experiments import refusal_of_fp8

        return refusal_of_fp8()
    if name == "bf16 layers" and not tiny:
        from gpu_experiments import refusal_of_fp8

        return "its peer, FP8, does not work here" if refusal_of_fp8() else ""
    return ""


def summary(found: Found) -> str:
    """In a line."""
    for key in ("error", "left out"):
        if key in found:
            return f"{key}: {found[key]}"
    numbers = {k: v for k, v in found.items() if isinstance(v, int | float)}
    words = [
        f"{key} {value:,.3g}" if value < 1e4 else f"{key} {value:,.0f}" for key, value in numbers.items()
    ]
    return ", ".join(words)


# --- the targets ------------------------------------------------------------------------------------------


def aims(found: dict[str, Found]) -> list[Aim]:
    """Every target, met or not; those that this run did not measure say so."""

    def aim(
        what: str, target: str, experiment: str, value: Callable[[Found], float], least: float, unit: str = ""
    ) -> Aim:
        own = found.get(experiment, {"left out": "not asked for"})
        try:
            number = value(own)
        except (KeyError, ValueError):
            return Aim(
                what, target, own.get("error") or own.get("left out") or "not on this device", "", None
            )
        return Aim(what, target, f"{number:,.3g}{unit}", "", number >= least)

    def least_share(way: str) -> Callable[[Found], float]:
        return lambda own: min(
            row[way] for row in own["rows"] if bound_by_memory(row["op"]) and row[way] is not None
        )

    def peer(name: str) -> Callable[[Found], float]:
        return lambda own: min(
            row["peers"][name] for row in own["rows"] if row["op"].startswith("cross_entropy")
        )

    def speed_up(own: Found) -> float:
        return float(own["tokens/s"] / found["bf16 layers"]["tokens/s"])

    results = [
        aim("fused operators, forward", ">= 0.90 of the copy", "operators", least_share("forward"), 0.9),
        aim("fused operators, backward", ">= 0.85 of the copy", "operators", least_share("backward"), 0.85),
        aim("cross entropy against Liger", ">= 5 times", "operators", peer("liger"), 5),
        aim("alignment 7B", ">= 20,000 tokens/s", "alignment", lambda f: f["tokens/s"], 20_000, " tokens/s"),
        aim("alignment 7B", ">= 0.60 MFU", "alignment", lambda f: f["MFU"], 0.6),
        aim("alignment 7B", ">= 36 samples/s", "alignment", lambda f: f["samples/s"], 36, " samples/s"),
        aim("Flamingo 7B", ">= 0.55 MFU", "flamingo", lambda f: f["MFU"], 0.55),
        aim("Flamingo 7B against dense mask", ">= 1.5 times", "flamingo", lambda f: f["times the peer"], 1.5),
        aim(
            "fine-tuning 7B", ">= 13,800 tokens/s", "finetuning", lambda f: f["tokens/s"], 13_800, " tokens/s"
        ),
        aim("FP8 over bf16, 65B-shaped", ">= 1.55 times", FP8, speed_up, 1.55),
    ]
    for key, most, unit in (("ms", 19.0, " ms"), ("extra GB", 0.3, " GB")):
        result = aim("fused loss", f"<= {most}{unit}", "fused loss", lambda f, key=key: f[key], 0.0, unit)  # type: ignore[misc]
        if result.met is not None:
            result = replace(result, met=found["fused loss"][key] <= most)
        results.append(result)
    return results


def bound_by_memory(op: str) -> bool:
    """Whether an operator is measured against the copy: not those that multiply matrices."""
    return not op.startswith(("media_attention", "linear_cross_entropy"))


def report(found: dict[str, Found], tiny: bool) -> Result:
    """Tables of what was found and, at full size, the targets."""
    what = "tiny sizes on this CPU: the code runs, the numbers say nothing" if tiny else "full size"
    result = Result(f"{machine()}; load {load()}; {what}")
    table = Table("", ["experiment", "seconds", "found"])
    for name, own in found.items():
        table.add(name, own["seconds"], summary({k: v for k, v in own.items() if k != "seconds"}))
    result.tables.append(table)
    if rows := found.get("operators", {}).get("rows"):
        shares = Table(
            "Operators: share of the copy, and times as fast as peers", ["op", "forward", "backward", "peers"]
        )
        for row in rows:
            peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["peers"].items())
            backward = "-" if row["backward"] is None else f"{row['backward']:.2f}"
            shares.add(row["op"], f"{row['forward']:.2f}", backward, peers)
        result.tables.append(shares)
    result.aims = [] if tiny else aims(found)
    result.values = found
    return result


def one(name: str, tiny: bool, out: Path) -> None:
    """An experiment in this process; its answer goes to a file."""
    import warnings

    from gpu_experiments import EXPERIMENTS

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    (out / f"{name.replace(' ', '_')}.json").write_text(json.dumps(EXPERIMENTS[name](tiny)))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of results and logs")
    parser.add_argument("--only", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=590, help="for all of them together")
    parser.add_argument(
        "--dry-run", action="store_true", help="build on the meta device, run tiny on the CPU"
    )
    parser.add_argument("--one", choices=list(LIMITS), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        one(args.one, args.tiny, args.out)
        return 0
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(
            "tools/benchmark/gpu.py: torch sees no GPU here; give --dry-run to try it on a CPU",
            file=sys.stderr,
        )
        return 2
    if args.dry_run:
        import gpu_plan

        print(gpu_plan.table(args.only).markdown())
    found = run(args, args.dry_run)
    result = report(found, args.dry_run)
    (args.out / "results.md").write_text(result.text())
    print(result.text())
    result.write(args.json)
    return 1 if any("error" in own for own in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
