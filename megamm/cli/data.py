"""megamm prepare: conversations and pictures into the form that training reads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, positive


def add_parsers(commands: Any) -> None:
    """Add the subcommands."""
    parser = add_command(
        commands,
        "prepare",
        prepare,
        "tokenize conversations and index their pictures ('megamm prepare tokenizer' trains a tokenizer)",
        "megamm prepare llava_665k.json --format llava --images data/ --tokenizer vicuna/tokenizer.model"
        " --out data/llava_665k",
    )
    _add_sources(parser)
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="T",
        help="tokenizer directory or SentencePiece model",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="folders or tar files with the pictures (default: the folder of each source)",
    )
    parser.add_argument("--workers", type=positive, default=1, metavar="N", help="processes (default 1)")

    tokenizer = add_command(
        commands,
        "prepare tokenizer",
        train_tokenizer,
        "train a SentencePiece tokenizer on the text of conversations",
        "megamm prepare tokenizer train.json --format llava --vocab-size 512 --out tokenizer",
    )
    _add_sources(tokenizer)
    tokenizer.add_argument(
        "--vocab-size", type=positive, required=True, metavar="N", help="tokens in all, <image> included"
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="files to read")
    parser.add_argument("--format", choices=("llava",), required=True, help="layout of the sources")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--template", choices=("vicuna", "plain"), default="vicuna", help="prompt template (default vicuna)"
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


def train_tokenizer(args: argparse.Namespace) -> int:
    """Run `megamm prepare tokenizer`."""
    from megamm.data.prepare import train_tokenizer_from_sources

    tokenizer = train_tokenizer_from_sources(
        sources=args.sources,
        format=args.format,
        out=args.out,
        vocab_size=args.vocab_size,
        template=args.template,
    )
    print(f"{args.out}: {tokenizer.vocab_size} tokens")
    return 0
