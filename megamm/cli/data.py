"""megamm prepare: conversations and pictures into the form that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from megamm.cli.common import add_command, positive
from megamm.config import TemplateName


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "prepare",
        prepare,
        "tokenize conversations and index their pictures ('megamm prepare tokenizer' makes a tokenizer)",
        "megamm prepare llava_665k.json --format llava --images data/ --tokenizer vicuna/tokenizer.model"
        " --out data/llava_665k",
    )
    _add_sources(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="T",
        help="tokenizer directory, SentencePiece model or tokenizer.json",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="folders or tar files with the pictures (default: the folder of each source)",
    )
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default 1)")


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="files to read")
    parser.add_argument("--format", choices=("llava",), required=True, help="layout of the sources")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--template",
        choices=get_args(TemplateName),
        default="vicuna",
        help="prompt template (default vicuna)",
    )


def prepare(args: argparse.Namespace) -> int:
    """Run `megamm prepare`."""
    from megamm.data.prepare import prepare as run

    report = run(
        sources=args.sources,
        out=args.out,
        tokenizer=args.tokenizer,
        format=args.format,
        template=args.template,
        images=args.images or [],
        workers=args.workers,
    )
    print(report.summary())
    return 0
