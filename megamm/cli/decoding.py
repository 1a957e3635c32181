"""Options of all commands that have a model answer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megamm.cli.common import positive

if TYPE_CHECKING:
    from megamm.inference import Decoding


# of the options that are values of a Decoding
NAMES = (
    *("max_new_tokens", "beams", "temperature", "top_p", "length_penalty", "repetition_penalty"),
    *("sample", "stop"),
)


def add_decoding(parser: argparse.ArgumentParser, max_new_tokens: int | None = 64) -> None:
    """Add the options of `decoding_of`.

    Args:
        max_new_tokens: the default; None: the command decides.
    """
    default = "" if max_new_tokens is None else f" (default {max_new_tokens})"
    group = parser.add_argument_group("how answers are chosen (without any: the likeliest token each time)")
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer{default}",
    )
    group.add_argument("--beams", type=positive, metavar="N", help="width of the beam search")
    group.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="draw from the scores divided by T; 0: the likeliest. With beams it changes nothing, as in"
        " transformers, unless --sample is given",
    )
    group.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the likeliest tokens of together probability P"
    )
    group.add_argument(
        "--sample", action="store_true", help="draw, also without --temperature, and the candidates of beams"
    )
    group.add_argument(
        "--length-penalty", type=float, metavar="X", help="beams: above 0 favours long answers (default 1)"
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help="above 1: tokens that were there already score less",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be given again"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")


def decoding_of(args: argparse.Namespace, **defaults: object) -> Decoding:
    """What the options of `add_decoding` ask for.

    Args:
        defaults: of options that were not given, by the names of Decoding.
    Raises:
        InputError: a value is out of its range.
    """
    from megamm.inference import Decoding

    return Decoding.chosen(defaults, {name: getattr(args, name) for name in NAMES}, args.seed)
