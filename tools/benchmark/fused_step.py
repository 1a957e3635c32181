#!/usr/bin/env python
"""What the fused operators save of a whole step: a 100M LLaVA-style model with and without them, on this CPU.

    python tools/benchmark/fused_step.py [--rounds 7] [--precision fp32]

The peer runs every operator in plain torch (its reference, as where the extension is not built), everything
else is the same. Both sides see the same weights and batches and take turns; loss and gradients must agree.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from common import Result, Table, add_json, load, machine
from frozen_parts import Side, seconds

from megamm.engine import groups
from megamm.ops import (
    cross_entropy,
    extension_built,
    extension_status,
    gated_residual,
    layer_norm,
    media_segments,
    rms_norm,
    rope,
    swiglu,
)
from megamm.recipe import recipe_from_dict

OPERATORS = (cross_entropy, gated_residual, layer_norm, media_segments, rms_norm, rope, swiglu)
LANGUAGE = {"num_layers": 8, "hidden_size": 768, "num_heads": 12, "ffn_hidden_size": 2048}
EYES = {"width": 256, "num_layers": 4, "num_heads": 8, "mlp_width": 1024}
VISION = {"image_size": 112, "patch_size": 14, **EYES}


@contextmanager
def plain_torch() -> Iterator[None]:
    """All operators run their references."""
    kept = [operator._FUSED_DEVICES for operator in OPERATORS]
    for operator in OPERATORS:
        operator._FUSED_DEVICES = frozenset()
    try:
        yield
    finally:
        for operator, devices in zip(OPERATORS, kept, strict=True):
            operator._FUSED_DEVICES = devices


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of both sides (median)")
    add_json(parser)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    if not extension_built():
        raise SystemExit(extension_status())
    raw = {
        "name": "benchmark",
        "run_dir": "unused",
        "tokenizer": "unused",
        "model": {"language": {**LANGUAGE, "vocab_size": 32000, "max_positions": 512}, "vision": VISION},
        "data": {"sequence_length": 256, "max_images": 1},
        "training": {"global_batch_size": 4, "micro_batch_size": 4, "precision": args.precision},
    }
    recipe = recipe_from_dict(raw)
    layout = groups.initialize(recipe.parallel, torch.device("cpu"), "gloo")
    side = Side(recipe, layout, labelled=0.5)
    size = sum(parameter.numel() for parameter in side.models[0].parameters())

    loss = side.step()
    ours = side.gradients()
    with plain_torch():
        wanted = side.step()
        theirs = side.gradients()
    tolerance = 1e-4 if args.precision == "fp32" else 0.05
    assert abs(loss - wanted) <= tolerance * abs(wanted), (loss, wanted)
    for name, gradient in theirs.items():
        difference = float((ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-6))
        assert difference <= tolerance, (name, difference)

    times: list[tuple[float, float]] = []
    for _ in range(args.rounds):
        fused = seconds(side.step)
        with plain_torch():
            times.append((fused, seconds(side.step)))
    fused, plain = (statistics.median(column) for column in zip(*times, strict=True))
    setting = f"{args.precision}, 4 x 256 positions, {torch.get_num_threads()} threads"
    table = Table(f"{size / 1e6:.0f}M parameters, {setting}", ["operators", "ms per step", "plain / fused"])
    table.add("fused", f"{fused * 1e3:.0f}", f"{plain / fused:.2f}")
    table.add("plain torch", f"{plain * 1e3:.0f}", "1.00")
    result = Result(f"{machine()}; median of {args.rounds}; load {load()}", [table])
    print(result.text())
    result.write(args.json)
    groups.shutdown()


if __name__ == "__main__":
    main()
