"""megamm parity: loss and gradients of parallel layouts against one process."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamm.cli.common import add_command, add_json, add_recipe, positive_number, print_json

if TYPE_CHECKING:
    from megamm.parity.compare import Divergence
    from megamm.parity.run import Plan, Result

TOLERANCE = 1e-5
TIMEOUT_S = 300.0


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "parity",
        parity,
        "compare one training step of parallel layouts with that of one process, and name what differs",
        "megamm parity examples/quickstart/llava.yaml --layouts tp2,pp2,tp2pp2sp",
    )
    add_recipe(parser, "YAML file of a stage")
    parser.add_argument(
        "--layouts",
        required=True,
        metavar="L,L,...",
        help="tpN, ppN, vppN, dpN, cpN and sp, joined: tp2,pp2vpp2,tp2pp2sp",
    )
    parser.add_argument(
        "--tolerance",
        type=positive_number,
        default=TOLERANCE,
        metavar="T",
        help=f"largest relative difference that passes (default {TOLERANCE:g})",
    )
    parser.add_argument(
        "--full-size", action="store_true", help="take the model as it is instead of a small one of its kind"
    )
    parser.add_argument(
        "--timeout",
        type=positive_number,
        default=TIMEOUT_S,
        metavar="S",
        help=f"seconds that a layout may take (default {TIMEOUT_S:g})",
    )
    add_json(parser)


def parity(args: argparse.Namespace) -> int:
    """Run `megamm parity`."""
    from megamm.parity.layouts import parse_layouts
    from megamm.parity.run import make_plan, run_layout, run_reference
    from megamm.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    plan = make_plan(recipe, parse_layouts(args.layouts), args.full_size)
    if not args.json:
        print(_introduction(args.recipe, plan, args.tolerance), flush=True)
    reference = run_reference(plan, args.timeout)
    results = []
    for layout in plan.layouts:
        results.append(run_layout(plan, layout, reference, args.tolerance, args.timeout))
        if not args.json:
            print(_row(results[-1], plan, args.tolerance), flush=True)
    if args.json:
        print_json(_finite(_document(plan, results, args.tolerance)))
    return 0 if all(result.passed(args.tolerance) for result in results) else 1


def _introduction(recipe: Path, plan: Plan, tolerance: float) -> str:
    training = plan.recipe.training
    num_micro_batches = training.global_batch_size // training.micro_batch_size
    where = "gloo on the CPU" if plan.device == "cpu" else "NCCL on GPUs"
    text = (
        f"{recipe}: one step of {num_micro_batches} synthetic micro-batches, random weights, fp32, {where}. "
        "Largest differences from one process, relative to the largest element of each tensor; "
        f"{tolerance:g} passes."
    )
    lines = textwrap.wrap(text, 108)
    if plan.changes:
        lines += textwrap.wrap("changed: " + ", ".join(plan.changes), 108, subsequent_indent="  ")
    for note in plan.notes:
        lines += textwrap.wrap(f"note: {note}", 108, subsequent_indent="  ")
    columns = "".join(f"{group:>{_width(group)}}" for group in _groups(plan))
    return "\n".join([*lines, "", f"{'layout':<12}{'loss':>9}{'grad norm':>11}{columns}"])


def _width(group: str) -> int:
    return max(11, len(group) + 2)


def _groups(plan: Plan) -> list[str]:
    """The column of each group of parameters that the stage trains."""
    from megamm.parity.compare import GROUPS
    from megamm.recipe_checks import trainable_parts

    parts = set(trainable_parts(plan.recipe))
    language = {"embedding", "attention", "mlp", "output"}
    return [group for group in GROUPS if group in parts or (group in language and "language" in parts)]


def _row(result: Result, plan: Plan, tolerance: float) -> str:
    verdict = "pass" if result.passed(tolerance) else "FAIL"
    found = result.comparison
    if found is None:
        return f"{result.layout.name:<12}{verdict}  {result.failure.rstrip()}"
    cells = [f"{found.loss:>9.1e}", f"{found.grad_norm:>11.1e}"]
    for group in _groups(plan):
        difference = found.gradients.get(group)
        cells.append(f"{f'{difference.value:.1e}' if difference else '-':>{_width(group)}}")
    row = f"{result.layout.name:<12}{''.join(cells)}  {verdict}"
    return row if found.first is None else f"{row}\n  {_explained(found.first)}"


def _explained(first: Divergence) -> str:
    size = "is not the same tensor" if first.value == float("inf") else f"differs by {first.value:.1e}"
    if first.kind == "activation":
        return f"first diverging module: {first.name}, whose output {size} ({first.place})"
    return f"outputs agree; first diverging gradient of the backward pass: {first.name}, which {size}"


def _finite(value: Any) -> Any:
    """The same document with null for what is infinite: JSON has no such number."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if value == float("inf") else value


def _document(plan: Plan, results: list[Result], tolerance: float) -> dict[str, Any]:
    return {
        "tolerance": tolerance,
        "device": plan.device,
        "changes": plan.changes,
        "notes": plan.notes,
        "passed": all(result.passed(tolerance) for result in results),
        "layouts": [
            {
                "layout": result.layout.name,
                "processes": result.layout.world,
                "passed": result.passed(tolerance),
                "failure": result.failure,
                **(asdict(result.comparison) if result.comparison else {}),
            }
            for result in results
        ],
    }
