"""megamm report: a run on one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "report",
        report,
        "one HTML page about a run: curves, answers of the model, skipped data, checkpoints, events",
        "megamm report runs/quickstart/llava --out page.html",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run_dir of a recipe, finished or not")
    parser.add_argument(
        "--out", type=Path, metavar="PAGE", help="file to write (default RUN_DIR/report.html)"
    )


def report(args: argparse.Namespace) -> int:
    """Run `megamm report`."""
    from megamm.report.page import write_report
    from megamm.report.sections import state_of

    out = args.out or args.run_dir / "report.html"
    run = write_report(args.run_dir, out)
    print(f"{out}: {state_of(run)[1]}")
    return 0
