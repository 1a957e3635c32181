"""What `megamm plan` prints: tables of at most 110 columns."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH = 110
_GIB = 2**30


def text_of(plan: dict[str, Any]) -> str:
    """The plan of planning/report.py for people."""
    lines = [
        f"{plan['recipe']}, stage {plan['stage']}, on {plan['gpus']} x {plan['gpu']} "
        f"({plan['gpu_memory'] / _GIB:.0f} GiB each)",
        *textwrap.wrap(_assumed(plan), WIDTH, subsequent_indent="  "),
        "",
    ]
    if "error" in plan:
        lines += [f"the recipe's own layout, {plan['layout']['name']}, does not work here:"]
        lines += textwrap.wrap(plan["error"], WIDTH, initial_indent="  ", subsequent_indent="  ")
    else:
        lines += _own(plan)
    return "\n".join([*lines, "", *_best(plan), *_refused(plan)])


def _assumed(plan: dict[str, Any]) -> str:
    images, most = plan["images_per_row"], plan["images_in_memory"]
    if images == most:
        rows = f"images in a row: {images:g}"
    else:
        rows = f"images in a row: {images:g} on average for the time, up to {most:g} for the memory"
    return f"assumed: {rows} (--images N sets both); loss at all text positions; data is never waited for"


def _own(plan: dict[str, Any]) -> list[str]:
    layout, times = plan["layout"], plan["layout"]["micro_batches"]
    return [
        f"the recipe's layout: {layout['name']} x data {layout['data']}; {times} "
        f"micro-batch{'es' if times > 1 else ''} of {layout['micro_batch_size']}; recomputation "
        f"{layout['recompute']}",
        "",
        *_parameters(plan),
        "",
        *_memory(plan),
        "",
        *_step(plan),
    ]


def _parameters(plan: dict[str, Any]) -> list[str]:
    model, ranks = plan["parameters"]["model"], plan["parameters"]["rank_of_stage"]
    flops, whole = plan["flops"], sum(plan["flops"].values())
    lines = [
        f"{'part':<16}{'parameters':>18}{'trained':>18}{'most on a rank':>18}{'TFLOP a step':>16}{'share':>8}"
    ]
    parts = list(dict.fromkeys([*model, *flops]))
    for part in parts:
        sizes = model.get(part, {"total": 0, "trained": 0})
        most = max((rank.get(part, {"total": 0})["total"] for rank in ranks), default=0)
        if not sizes["total"] and not flops.get(part):
            continue
        counts = [f"{sizes['total']:,}", f"{sizes['trained']:,}", f"{most:,}"] if sizes["total"] else [""] * 3
        name = "output layer" if part == "head" else part
        work = flops.get(part)
        cells = [f"{work / 1e12:,.1f}", f"{work / whole:.1%}"] if work is not None else ["", ""]
        lines.append(f"{name:<16}" + "".join(f"{c:>18}" for c in counts) + f"{cells[0]:>16}{cells[1]:>8}")
    total = [sum(sizes[key] for sizes in model.values()) for key in ("total", "trained")]
    most = max(sum(part["total"] for part in rank.values()) for rank in ranks)
    sums = "".join(f"{number:>18,}" for number in (*total, most))
    return [*lines, f"{'all':<16}{sums}{whole / 1e12:>16,.1f}{'100%':>8}"]


_MEMORY_NAMES = {
    "gradients": "grads",
    "optimizer": "optim.",
    "activations": "activ.",
    "vision_features": "features",
    "allowance": "allowed",
}


def _memory(plan: dict[str, Any]) -> list[str]:
    stages = plan["memory"]["stages"]
    kinds = [kind for kind in stages[0] if kind not in ("total", "layers")]
    names, width = [_MEMORY_NAMES.get(kind, kind) for kind in kinds], min(10, (WIDTH - 20) // len(kinds))
    lines = ["GiB of a rank, at the peak of a step"]
    lines.append(
        f"{'stage':>5}{'layers':>7}"
        + "".join(f"{name[: width - 1]:>{width}}" for name in names)
        + f"{'total':>8}"
    )
    rows = [
        f"{stage['layers']:>7}"
        + "".join(f"{stage[kind] / _GIB:>{width}.2f}" for kind in kinds)
        + f"{stage['total'] / _GIB:>8.2f}"
        for stage in stages
    ]
    for first, last in _runs(rows):
        place = str(first) if first == last else f"{first}-{last}"
        lines.append(f"{place:>5}{rows[first]}")
    most, limit, have = max(stage["total"] for stage in stages), plan["memory_limit"], plan["gpu_memory"]
    verdict = "fits" if plan["memory"]["fits"] else "DOES NOT FIT"
    return [
        *lines,
        f"{verdict}: {most / _GIB:.1f} GiB of {limit / _GIB:.1f} on the fullest stage ({limit / have:.0%} of "
        f"{have / _GIB:.1f} is planned with)",
    ]


def _runs(rows: list[str]) -> list[tuple[int, int]]:
    """First and last of the stretches of equal rows."""
    found: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        if found and rows[found[-1][0]] == row:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


_WHERE = (
    ("forward", "forward"),
    ("backward", "backward"),
    ("recompute", "recomputation"),
    ("tensor", "waiting for the tensor-parallel group"),
    ("pipeline", "waiting for tensors of other stages"),
    ("bubble", "pipeline bubble"),
    ("data", "gradients and weights over data parallelism"),
    ("optimizer", "optimizer"),
)


def _step(plan: dict[str, Any]) -> list[str]:
    step, stage = plan["step"], plan["stage_time"]
    schedule, seconds = step["schedule"], step["seconds"]
    lines = [f"a step: {_seconds(seconds)}, of which"]
    for key, name in _WHERE:
        if schedule[key] >= 0.0005 * seconds:
            lines.append(f"  {_seconds(schedule[key]):>9} {schedule[key] / seconds:>6.1%}  {name}")
    kinds = ", ".join(
        f"{name} {_seconds(schedule[key])}"
        for key, name in (
            ("products", "matrix products"),
            ("attention", "attention"),
            ("memory", "memory-bound operators"),
        )
    )
    compute = sum(schedule[key] for key in ("forward", "backward", "recompute"))
    if compute < seconds / 2:
        worst = max(("tensor", "pipeline", "bubble", "data"), key=lambda key: schedule[key])
        lines.append(
            f"  bound by waiting: computing is {compute / seconds:.0%}; most is {dict(_WHERE)[worst]}"
        )
    peak = ", of the bf16 peak" if plan["fp8"] != "off" else ""
    return [
        *lines,
        f"computing of the slowest stage: {kinds}",
        f"MFU {step['mfu']:.1%}, HFU {step['hfu']:.1%}{peak}; {step['tokens_per_s_per_gpu']:,.0f} tokens/s "
        f"on each GPU, {step['samples_per_s']:,.1f} samples/s",
        f"the stage: {stage['steps']:,} steps, {_days(stage['days'])}, {stage['gpu_hours']:,.0f} GPU-hours",
    ]


def _best(plan: dict[str, Any]) -> list[str]:
    if not plan["best"]:
        return [
            f"none of the {plan['tried']:,} layouts that were timed fits; take more GPUs or larger ones, "
            "shorter rows or fewer images"
        ]
    lines = [f"fastest of {plan['tried']:,} layouts that were timed, of each split of the model"]
    lines.append(
        f"{'':>3}{'step':>10}{'MFU':>7}{'bubble':>8}{'waiting':>9}{'GiB':>7}{'stage':>12}  "
        f"layout, micro-batch, recomputation"
    )
    for number, best in enumerate(plan["best"], 1):
        s, layout, seconds = best["schedule"], best["layout"], best["seconds"]
        waiting = (s["tensor"] + s["pipeline"] + s["data"]) / seconds
        lines.append(
            f"{number:>2}.{_seconds(seconds):>10}{best['mfu']:>7.1%}{s['bubble'] / seconds:>8.1%}"
            f"{waiting:>9.1%}{best['memory']['total'] / _GIB:>7.1f}{_days(best['days']):>12}  "
            f"{_short(layout)}"
        )
        wanted = " ".join(best["overrides"]) or "(the recipe as it is)"
        lines += textwrap.wrap(
            wanted, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4, break_on_hyphens=False
        )
    return lines


def _short(layout: dict[str, Any]) -> str:
    chunks = f"x{layout['virtual_pipeline']}" if (layout["virtual_pipeline"] or 1) > 1 else ""
    uneven = " uneven" if layout["pipeline_layout"] else ""
    context = f" CP{layout['context']}" if layout["context"] > 1 else ""
    name = f"TP{layout['tensor']} PP{layout['pipeline']}{chunks}{uneven}{context} DP{layout['data']}"
    return f"{name}, {layout['micro_batch_size']}, {layout['recompute']}"


_KINDS = (
    ("memory", "too large, the smallest first"),
    ("layout", "refused by the model's sizes"),
    ("batch", "refused by the batch"),
)


def _refused(plan: dict[str, Any], most: int = 3) -> list[str]:
    lines = []
    for kind, name in _KINDS:
        found = [refused for refused in plan["refused"] if refused["kind"] == kind]
        if not found:
            continue
        lines += ["", f"{name}: {len(found)} layout{'s' if len(found) > 1 else ''}"]
        for refused in found[:most]:
            text = f"{_cut(refused['layout'])}: {refused['reason']}"
            lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
        if len(found) > most:
            rest = ", ".join(_cut(refused["layout"]) for refused in found[most:])
            lines += textwrap.wrap(f"and so {rest}", WIDTH, initial_indent="  ", subsequent_indent="    ")[:3]
    return lines


def _cut(layout: str) -> str:
    """Without the letters of an uneven split."""
    return " ".join("uneven" if word.startswith("E") else word for word in layout.split())


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _days(days: float) -> str:
    if days >= 1:
        return f"{days:,.1f} days"
    return f"{days * 24:.1f} h" if days >= 1 / 24 else f"{days * 1440:.0f} min"
