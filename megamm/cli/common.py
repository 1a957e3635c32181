"""What the subcommands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a subcommand: its one-line summary, an example at the end of --help, and --debug."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def add_recipe(parser: argparse.ArgumentParser, help_text: str) -> None:
    """The recipe, and what is said of it on the command line."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help=help_text)
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="--a.b=c",
        help="values that replace those of the recipe; `--a.b` alone stands for `--a.b=true`",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json: machine-readable output on stdout."""
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


def positive(text: str) -> int:
    """An argparse type: a whole number above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def positive_number(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False)
    print()
