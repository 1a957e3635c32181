"""megamm generate: what a trained model answers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, positive
from megamm.cli.decoding import add_decoding, decoding_of

IMAGE = "<image>"


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "generate",
        generate,
        "answer one question about pictures",
        "megamm generate --checkpoint runs/llava --image cat.jpg --prompt 'What is this?' --beams 5",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--image", action="append", default=[], type=Path, metavar="I", help="picture; may be given again"
    )
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="P",
        help=f"question; where it has no {IMAGE}, the pictures stand before it",
    )
    add_decoding(parser)
    _add_layout(parser)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint or run directory"
    )


def _add_layout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the model is divided (under torchrun or srun)")
    for name, what in (("tensor", "each layer"), ("pipeline", "the layers")):
        group.add_argument(
            f"--{name}",
            type=positive,
            default=1,
            metavar="N",
            help=f"processes that share {what} (default 1)",
        )


def generate(args: argparse.Namespace) -> int:
    """Run `megamm generate`."""
    from megamm.data.templates import Turn
    from megamm.errors import InputError

    prompt = args.prompt if IMAGE in args.prompt else f"{IMAGE}\n" * len(args.image) + args.prompt
    if prompt.count(IMAGE) != len(args.image):
        raise InputError(
            f"--prompt: has {prompt.count(IMAGE)} {IMAGE} for {len(args.image)} pictures; "
            f"give one --image for each, or leave {IMAGE} out"
        )
    for image in args.image:
        if not image.is_file():
            raise InputError(f"{image}: no such file; give a picture")
    decoding = decoding_of(args)
    from megamm.engine import groups
    from megamm.engine.launcher import take_place_from_slurm
    from megamm.inference import load

    take_place_from_slurm(os.environ)
    model = load(args.checkpoint, tensor=args.tensor, pipeline=args.pipeline)
    (answer,) = model.generate([[Turn("user", prompt)]], [args.image], decoding=decoding)
    if model.copy == 0 and model.is_spokesman:
        print(answer)
    groups.shutdown()
    return 0
