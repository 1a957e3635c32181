"""megamm train: one stage of a recipe."""

from __future__ import annotations

import argparse
import os
from typing import Any

from megamm.cli.common import add_command, add_recipe, positive
from megamm.cli.launched import run_as_rank
from megamm.errors import InputError
from megamm.recipe_presets import PRESETS


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "train",
        train,
        "train one stage of a recipe, in one process or under torchrun or srun",
        "torchrun --nproc-per-node 2 -m megamm train examples/quickstart/llava.yaml --parallel.tensor=2",
    )
    add_recipe(parser, "YAML file of the stage")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="tiny: the same stage, small enough to try out on a CPU; files lie below runs/tiny",
    )
    parser.add_argument("--print-config", action="store_true", help="print the complete recipe and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="print sizes and layout of what would run and stop"
    )
    parser.add_argument(
        "--world",
        type=positive,
        metavar="N",
        help="--dry-run: of N processes, what each pipeline stage holds",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="--dry-run: what rank R holds")


def train(args: argparse.Namespace) -> int:
    """Run `megamm train`."""
    if args.print_config or args.dry_run:
        return _train(args)
    return run_as_rank(lambda: _train(args), os.environ)


def _train(args: argparse.Namespace) -> int:
    from megamm.recipe import load_recipe, recipe_to_yaml

    if not args.dry_run and (args.world, args.rank) != (None, None):
        raise InputError("--world, --rank: describe processes that are not started; add --dry-run")
    recipe = load_recipe(args.recipe, args.overrides, args.preset)
    if args.print_config:
        print(recipe_to_yaml(recipe), end="")
        return 0
    if args.dry_run:
        from megamm.planning.dry_run import dry_run

        print(dry_run(recipe, args.world, args.rank))
        return 0
    from megamm.engine.launcher import take_place_from_slurm
    from megamm.training.train import train as run

    take_place_from_slurm(os.environ)
    return run(recipe)
