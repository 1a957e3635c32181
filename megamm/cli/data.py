"""megamm prepare: conversations and pictures into the form that training reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from megamm.cli.common import add_command, positive
from megamm.config import TemplateName


class Names:
    """Choices of an option that are only loaded when the option is used or its help is shown."""

    def __init__(self, load: Callable[[], Iterable[str]]):
        self.load = load

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())

    def __contains__(self, name: object) -> bool:
        return name in list(self.load())


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
    parser.add_argument(
        "--instructions",
        choices=Names(_instructions),
        default="none",
        metavar="I",
        help="words of a recipe around captions and questions: %(choices)s (default none)",
    )
    parser.add_argument(
        "--image-checks",
        choices=("full", "header", "none"),
        default="full",
        help="read every picture whole, and notice later changes (default), or its header, or not at all",
    )
    _add_format_options(parser)
    parser.add_argument(
        "--workers",
        type=positive,
        default=1,
        metavar="N",
        help="processes; the result is the same (default 1)",
    )
    parser.add_argument(
        "--restart", action="store_true", help="throw away what an interrupted run has left, and begin anew"
    )


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="files to read")
    parser.add_argument(
        "--format", choices=Names(formats), required=True, metavar="F", help="of the sources: %(choices)s"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--template",
        choices=get_args(TemplateName),
        default="vicuna",
        metavar="T",
        help="prompt template: %(choices)s (default vicuna; plain and pair are for captions, interleaved and"
        " text for documents)",
    )


def _add_format_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split", metavar="NAME", help="ocrvqa and scienceqa: part of the data (default train)"
    )
    parser.add_argument(
        "--min-similarity",
        type=float,
        metavar="X",
        help="web documents: keep a picture if its text matches so well (default 0.24)",
    )
    parser.add_argument(
        "--max-images", type=positive, metavar="N", help="web documents: pictures of one document (default 6)"
    )
    parser.add_argument(
        "--keep-single-image",
        type=float,
        metavar="SHARE",
        help="web documents: share of those with one picture that stays (default 0.5)",
    )


def formats() -> Iterable[str]:
    """Names of the formats."""
    from megamm.data.formats import FORMATS

    return FORMATS


def _instructions() -> Iterable[str]:
    from megamm.data.instructions import names

    return names()


def prepare(args: argparse.Namespace) -> int:
    """Run `megamm prepare`."""
    from megamm.data.formats import FORMATS, FormatOptions
    from megamm.data.prepare import prepare as run
    from megamm.errors import InputError

    given = {name: getattr(args, name) for name in FormatOptions.__dataclass_fields__}
    for name, value in given.items():
        if value is not None and name not in FORMATS[args.format].uses:
            option = name.replace("_", "-")
            raise InputError(f"--{option}: makes no difference to --format {args.format}; leave it out")
    report = run(
        sources=args.sources,
        out=args.out,
        tokenizer=args.tokenizer,
        format=args.format,
        template=args.template,
        images=args.images or [],
        workers=args.workers,
        instructions=args.instructions,
        options=FormatOptions(**{name: value for name, value in given.items() if value is not None}),
        image_checks=args.image_checks,
        restart=args.restart,
        progress=True,
    )
    print(report.summary())
    return 0
