"""megamm prepare tokenizer: train a tokenizer, or add tokens to one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from megamm.cli.common import add_command, positive
from megamm.cli.data import Names, formats
from megamm.config import TemplateName
from megamm.errors import InputError


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "prepare tokenizer",
        prepare_tokenizer,
        "train a SentencePiece tokenizer on the text of conversations, or add tokens to a tokenizer",
        "megamm prepare tokenizer train.json --format llava --vocab-size 512 --out tokenizer\n"
        "  megamm prepare tokenizer --from zephyr-7b --add-token '<|endofchunk|>' --out tokenizer",
    )
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="files to train on")
    parser.add_argument("--format", choices=Names(formats), metavar="F", help="of the sources: %(choices)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--template",
        choices=get_args(TemplateName),
        default="vicuna",
        help="prompt template whose words are trained on too (default vicuna)",
    )
    parser.add_argument(
        "--vocab-size", type=positive, metavar="N", help="tokens in all, <image> included, of a new tokenizer"
    )
    parser.add_argument(
        "--from",
        dest="base",
        type=Path,
        metavar="T",
        help="extend this tokenizer (directory or file) instead of training one",
    )
    parser.add_argument(
        "--add-token",
        action="append",
        default=[],
        metavar="TEXT",
        help="with --from: a new token; again for more. <image> is added behind them if it is missing",
    )


def prepare_tokenizer(args: argparse.Namespace) -> int:
    """Run `megamm prepare tokenizer`."""
    from megamm.data.prepare import train_tokenizer_from_sources
    from megamm.data.tokenizer import Tokenizer

    _check(args)
    if args.base is None:
        tokenizer = train_tokenizer_from_sources(
            sources=args.sources,
            format=args.format,
            out=args.out,
            vocab_size=args.vocab_size,
            template=args.template,
        )
        print(f"{args.out}: {tokenizer.vocab_size} tokens")
        return 0
    tokenizer = Tokenizer.load(args.base, args.add_token)
    tokenizer.save(args.out)
    added = ", ".join(f"{text} is {index}" for text, index in tokenizer.added_tokens.items())
    print(f"{args.out}: {tokenizer.vocab_size} tokens{f'; {added}' if added else ''}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise InputError(f"{args.out}: exists already; choose another --out")
    training = [name for name in ("sources", "format", "vocab_size") if getattr(args, name)]
    if args.base is None:
        if args.add_token:
            raise InputError("--add-token: needs a tokenizer to extend; name it with --from")
        if len(training) < 3:
            raise InputError(
                "prepare tokenizer: give sources, --format and --vocab-size to train a tokenizer, or --from"
                " to extend one"
            )
        return
    if training:
        raise InputError("--from: a tokenizer is extended, not trained; leave out sources and their options")
    if any(not text for text in args.add_token):
        raise InputError("--add-token: is empty; give the text of the token")
