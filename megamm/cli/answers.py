"""megamm generate: what a trained model answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, positive

IMAGE = "<image>"


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "generate",
        generate,
        "answer one question about pictures",
        "megamm generate --checkpoint runs/llava --image cat.jpg --prompt 'What is this?'",
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
    _add_length(parser)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint or run directory"
    )


def _add_length(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="longest answer (default 64)"
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
    from megamm.inference import load

    model = load(args.checkpoint)
    print(model.generate([[Turn("user", prompt)]], [args.image], max_new_tokens=args.max_new_tokens)[0])
    return 0
