"""megamm data check, stats, preview: what is in a prepared dataset, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamm.cli.common import add_command, add_json, positive, print_json
from megamm.errors import InputError

if TYPE_CHECKING:
    from megamm.data.inspect.limits import Limits

EPILOG = """\
examples:
  megamm data check data/llava_665k --recipe llava.yaml      what is broken, what truncation would cut
  megamm data stats data/llava_665k --plot stats.svg         lengths, images, label share
  megamm data preview data/llava_665k --out page.html        samples as training sees them
"""


def add_parsers(commands: Any) -> None:
    """Add the subcommands."""
    data = commands.add_parser(
        "data",
        help="look at prepared datasets: check, stats, preview",
        description="Look at a dataset that `megamm prepare` has written.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    looks = data.add_subparsers(dest="look", metavar="LOOK", required=True)
    _add_check(looks)
    _add_stats(looks)
    _add_preview(looks)


def _add_check(looks: Any) -> None:
    parser = add_command(
        looks,
        "check",
        check,
        "find everything that is broken in a dataset and list it; exits with 1 if there is anything",
        "megamm data check data/llava_665k --recipe llava.yaml --workers 8 --list broken.jsonl",
    )
    _add_common(parser)
    parser.add_argument(
        "--images",
        choices=("decode", "header", "none"),
        default="decode",
        help="read images to the last pixel, to their header, or not at all (default decode)",
    )
    parser.add_argument(
        "--workers", type=_count, default=1, metavar="N", help="processes (default 1; 0: none but this one)"
    )
    parser.add_argument(
        "--list",
        dest="listing",
        type=Path,
        metavar="FILE.jsonl",
        help="write all findings there, one per line",
    )
    parser.add_argument(
        "--limit", type=_count, default=5, metavar="N", help="findings of each kind to print (default 5)"
    )
    add_json(parser)


def _add_stats(looks: Any) -> None:
    parser = add_command(
        looks,
        "stats",
        stats,
        "lengths, images, label share and how full rows become",
        "megamm data stats data/llava_665k --recipe llava.yaml --plot stats.svg",
    )
    _add_common(parser)
    parser.add_argument("--sample", type=positive, metavar="N", help="look at N samples (default: all)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the distributions into this file")
    add_json(parser)


def _add_preview(looks: Any) -> None:
    parser = add_command(
        looks,
        "preview",
        preview,
        "one HTML page that shows samples: pictures, tokens, and which of them carry loss",
        "megamm data preview data/llava_665k --sample 20 --out page.html",
    )
    _add_common(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("preview.html"),
        metavar="PAGE",
        help="file to write (default preview.html)",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--rows", type=_rows, metavar="I,J,...", help="samples to show, from 0")
    chosen.add_argument(
        "--sample", type=positive, default=20, metavar="N", help="show N samples drawn at random (default 20)"
    )
    parser.add_argument(
        "--seed", type=_count, default=0, metavar="S", help="of the random choice (default 0)"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="directory written by megamm prepare")
    parser.add_argument("--recipe", type=Path, metavar="R", help="take lengths from this recipe")
    parser.add_argument("--sequence-length", type=positive, metavar="N", help="positions of a sample at most")
    parser.add_argument("--tokens-per-image", type=positive, metavar="M", help="positions of an image")
    parser.add_argument("--max-images", type=_count, metavar="K", help="images of a sample at most")


def _limits(args: argparse.Namespace) -> Limits:
    from megamm.data.inspect.limits import Limits

    numbers = (args.sequence_length, args.tokens_per_image, args.max_images)
    if args.recipe is None:
        return Limits.of_numbers(*numbers)
    if numbers != (None, None, None):
        raise InputError(
            "--recipe: tells all lengths; leave out --sequence-length, --tokens-per-image and --max-images"
        )
    return Limits.of_recipe(args.recipe, args.directory)


def check(args: argparse.Namespace) -> int:
    """Run `megamm data check`."""
    from megamm.data.inspect.check import CheckOptions
    from megamm.data.inspect.check import check as run

    options = CheckOptions(
        limits=_limits(args),
        images=args.images,
        workers=args.workers,
        listing=args.listing,
        examples=args.limit,
        progress=True,
    )
    report = run(args.directory, options)
    if args.json:
        print(json.dumps(report.content(), indent=1))  # names may hold what no terminal can show
    else:
        print("\n".join(report.lines(args.limit)))
    return 1 if report.problems else 0


def stats(args: argparse.Namespace) -> int:
    """Run `megamm data stats`."""
    from megamm.data.inspect.plot import write_plot
    from megamm.data.inspect.stats import collect

    limits = _limits(args)
    statistics = collect(args.directory, limits, args.sample, progress=True)
    if args.json:
        print_json(statistics.content())
    else:
        print("\n".join(statistics.lines()))
    if args.plot is not None:
        write_plot(statistics, args.plot, limits.sequence_length)
        print(f"{args.plot}: written", file=sys.stderr)
    return 0


def preview(args: argparse.Namespace) -> int:
    """Run `megamm data preview`."""
    from megamm.data.inspect.preview import write_preview

    shown = write_preview(
        directory=args.directory,
        out=args.out,
        limits=_limits(args),
        rows=args.rows,
        sample=args.sample,
        seed=args.seed,
    )
    print(f"{args.out}: {shown} samples")
    return 0


def _count(text: str) -> int:
    """An argparse type: a whole number, 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def _rows(text: str) -> list[int]:
    """An argparse type: rows with commas between them."""
    return [_count(row.strip()) for row in text.split(",")]
