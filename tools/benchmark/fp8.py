#!/usr/bin/env python
"""FP8 against bf16: a LLaVA-style model of a billion parameters, trained a few steps on the same batches.

    python tools/benchmark/fp8.py --out FOLDER [--steps 20] [--bound 0.05] [--scalings delayed,current]

The batches are a few synthetic ones in turn, which the model learns by heart, so that the loss falls.
Written are fp8.md (the losses step by step, the step times), fp8.json and fp8.svg (the curves). Exit code 1:
a loss of FP8 departs from that of bf16 by more than the bound (relative), is no number, or is bf16's to the
last bit, so that nothing was computed in FP8; 2: FP8 does not work here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.device import device_name, distributed_backend, fp8_status, pick_device, require_fp8
from megamm.engine import groups
from megamm.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from megamm.engine.weights import initialize
from megamm.models.initialization import weight_drawer
from megamm.models.vlm import build_model
from megamm.parity.batches import synthetic_batch
from megamm.parity.shrink import IMAGE_ID
from megamm.recipe import recipe_from_dict

LANGUAGE = {"num_layers": 16, "hidden_size": 2048, "num_heads": 16, "ffn_hidden_size": 5632}
VISION = {"image_size": 224, "patch_size": 14, "width": 768, "num_layers": 12, "num_heads": 12}
DIFFERENT_STEPS = 2  # whose batches come in turn
WARM_STEPS = 5  # at the start, that are not timed
COLOURS = ("#333333", "#c8553d", "#2f6f9f", "#5a8f3c", "#8a5aa8")


@dataclass(frozen=True)
class Curve:
    """One run: what it was, and loss and seconds of each step."""

    name: str
    losses: list[float]
    seconds: list[float]

    @property
    def step_time(self) -> float:
        """Median seconds of a step, without the first ones."""
        return statistics.median(self.seconds[WARM_STEPS:] or self.seconds)


def recipe_of(scaling: str, **overrides: Any) -> Recipe:
    """About a billion parameters, 2 micro-batches of 4 x 2048 positions a step."""
    raw = {
        "name": "fp8 check",
        "run_dir": "unused",
        "tokenizer": "unused",
        "model": {
            "assembly": "merged",
            "connector": {"kind": "mlp"},
            "language": {**LANGUAGE, "vocab_size": 32000},
            "vision": {**VISION, "mlp_width": 3072},
        },
        "data": {"sequence_length": 2048, "max_images": 2},
        "training": {
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "precision": "bf16",
            "fp8": {"scaling": scaling, "amax_history": 16 if scaling == "delayed" else 1024},
        },
        "optimizer": {"lr": 3e-4, "schedule": "constant", "warmup_steps": 4},
        "parallel": {"backend": "te"},
    }
    return recipe_from_dict(raw, overrides=[f"{key}={value}" for key, value in overrides.items()])


def run(name: str, recipe: Recipe, steps: int, backend: str) -> Curve:
    """Train in this process."""
    device = pick_device(recipe.training.device)
    layout = groups.initialize(recipe.parallel, device, distributed_backend(device))
    models = build_model(recipe, layout, backend, IMAGE_ID)
    initialize(models, weight_drawer(recipe.model, recipe.seed))
    wrapped = wrap_data_parallel(models, recipe, layout)
    optimizer = build_optimizer(wrapped, recipe, layout)
    schedule = build_schedule(optimizer, recipe.optimizer, steps)
    count = recipe.training.global_batch_size // recipe.training.micro_batch_size
    batches = [
        [_on(synthetic_batch(recipe, turn * count + n), device) for n in range(count)]
        for turn in range(DIFFERENT_STEPS)
    ]
    curve = Curve(name, [], [])
    for step in range(steps):
        started = time.perf_counter()
        for model in wrapped:
            model.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward_backward(wrapped, batches[step % DIFFERENT_STEPS], layout)
        _, grad_norm, _ = optimizer.step()
        float(grad_norm or 0)  # waits for the device
        schedule.step(1)
        curve.losses.append(loss)
        curve.seconds.append(time.perf_counter() - started)
    groups.shutdown()
    return curve


def _on(batch: Batch, device: torch.device) -> Batch:
    return batch.to(device)


def departures(reference: Curve, curve: Curve, bound: float) -> list[str]:
    """What is wrong with the losses of `curve`, seen from those of `reference`."""
    if not all(map(math.isfinite, [*curve.losses, *reference.losses])):
        return [f"{curve.name}: a loss is no number"]
    if curve.losses == reference.losses:
        return [
            f"{curve.name}: every loss is that of {reference.name} to the last bit; FP8 was not in effect"
        ]
    worst, step = max((d, step) for step, d in enumerate(differences(reference, curve), 1))
    if worst > bound:
        return [
            f"{curve.name}: at step {step} the loss departs by {worst:.2%} from that of {reference.name}, "
            f"more than {bound:.2%}"
        ]
    return []


def differences(reference: Curve, curve: Curve) -> list[float]:
    """Relative differences of the losses, step by step."""
    return [abs(a - b) / abs(b) for a, b in zip(curve.losses, reference.losses, strict=True)]


def table(curves: Sequence[Curve], bound: float, machine: str) -> str:
    """The result as Markdown; the first curve is the reference."""
    reference = curves[0]
    lines = [f"# FP8 against {reference.name}", "", f"{machine}; bound of the loss {bound:.2%}", ""]
    lines += ["| run | step time | speed-up | last loss | largest difference |", "|---|---|---|---|---|"]
    for curve in curves:
        worst = max(differences(reference, curve))
        ratio = reference.step_time / curve.step_time
        lines.append(
            f"| {curve.name} | {curve.step_time * 1e3:.1f} ms | {ratio:.2f} | {curve.losses[-1]:.4f} | "
            f"{worst:.2%} |"
        )
    lines += ["", "| step | " + " | ".join(c.name for c in curves) + " |", "|---|" + "---|" * len(curves)]
    for step in range(len(reference.losses)):
        lines.append(f"| {step + 1} | " + " | ".join(f"{c.losses[step]:.4f}" for c in curves) + " |")
    return "\n".join(lines) + "\n"


def picture(curves: Sequence[Curve]) -> str:
    """The loss curves as SVG."""
    width, height, margin = 640, 360, 48
    values = [loss for curve in curves for loss in curve.losses if math.isfinite(loss)] or [0.0]
    low, high = min(values), max(values)
    steps = max(len(curve.losses) for curve in curves)

    def point(step: int, loss: float) -> str:
        x = margin + (width - 2 * margin) * step / max(steps - 1, 1)
        y = height - margin - (height - 2 * margin) * (loss - low) / ((high - low) or 1.0)
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{margin},{margin} V{height - margin} H{width - margin}" fill="none" stroke="#999"/>',
        f'<text x="{margin - 6}" y="{margin + 4}" text-anchor="end">{high:.2f}</text>',
        f'<text x="{margin - 6}" y="{height - margin + 4}" text-anchor="end">{low:.2f}</text>',
        f'<text x="{margin}" y="{margin - 14}">loss</text>',
        f'<text x="{margin}" y="{height - margin + 16}">1</text>',
        f'<text x="{width - margin}" y="{height - margin + 16}" text-anchor="end">step {steps}</text>',
    ]
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(point(step, loss) for step, loss in enumerate(curve.losses) if math.isfinite(loss))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts.append(
            f'<text x="{width - margin}" y="{margin + 16 * number}" text-anchor="end" fill="{colour}">'
            f"{curve.name}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def write(curves: Sequence[Curve], bound: float, machine: str, out: Path) -> list[str]:
    """Write all results; returns what is wrong."""
    wrong = [text for curve in curves[1:] for text in departures(curves[0], curve, bound)]
    out.mkdir(parents=True, exist_ok=True)
    result: Mapping[str, Any] = {
        "machine": machine,
        "bound": bound,
        "runs": [asdict(curve) for curve in curves],
        "problems": wrong,
    }
    (out / "fp8.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "fp8.md").write_text(table(curves, bound, machine))
    (out / "fp8.svg").write_text(picture(curves))
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bound", type=float, default=0.05, help="relative difference of the losses")
    parser.add_argument("--scalings", default="delayed,current", help="of training.fp8.scaling")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one run, in a process of its own
    args = parser.parse_args()
    scalings = args.scalings.split(",")
    for scaling in scalings:
        status = fp8_status().get(scaling)
        if status is None or not status.works:
            reason = status.reason if status else f"there are {', '.join(fp8_status())}"
            print(
                f"tools/fp8_check.sh: FP8 with {scaling} scaling does not work here: {reason}",
                file=sys.stderr,
            )
            return 2
    if args.only:
        recipe = recipe_of(args.only)
        require_fp8(args.only, "te", pick_device("auto"))
        name = "bf16" if args.only == "off" else f"FP8 {args.only}"
        (args.out / f"{args.only}.json").write_text(json.dumps(asdict(run(name, recipe, args.steps, "te"))))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    curves = []
    for scaling in ("off", *scalings):  # one process each: Transformer Engine keeps state of its own
        command = [sys.executable, __file__, "--out", str(args.out), "--steps", str(args.steps)]
        subprocess.run([*command, "--scalings", args.scalings, "--only", scaling], check=True)
        curves.append(Curve(**json.loads((args.out / f"{scaling}.json").read_text())))
    wrong = write(
        curves, args.bound, f"{device_name(pick_device('auto'))}, torch {torch.__version__}", args.out
    )
    print((args.out / "fp8.md").read_text())
    for text in wrong:
        print(f"tools/fp8_check.sh: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
