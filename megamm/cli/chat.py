"""megamm chat: a conversation with a trained model, in the terminal or in the browser."""

from __future__ import annotations

import argparse
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, positive
from megamm.errors import InputError

_INSTALL = "pip install 'gradio>=6,<7'"


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "chat",
        chat,
        "talk with a model about pictures, in the terminal or in the browser",
        "megamm chat --checkpoint runs/llava --image cat.jpg",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint or run directory"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        metavar="I",
        help="picture that is shown with the first question; may be given again",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: that of the template)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=256, metavar="N", help="longest answer (default 256)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="draw the answer from the scores divided by T; 0, the default: the likeliest answer",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens of together probability P",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    page = parser.add_argument_group("in the browser")
    page.add_argument("--web", action="store_true", help="serve a page (needs gradio)")
    page.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen at (default 127.0.0.1: this machine)",
    )
    page.add_argument("--port", type=positive, default=7860, metavar="N", help="port (default 7860)")


def chat(args: argparse.Namespace) -> int:
    """Run `megamm chat`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("WORLD_SIZE: a chat runs in one process; start it without torchrun or srun")
    if args.web:
        _check_gradio()
    for image in args.image:
        if not image.is_file():
            raise InputError(f"{image}: no such file; give a picture")
    from megamm.inference import Decoding

    is_drawn = bool(args.temperature) if args.temperature is not None else args.top_p is not None
    decoding = Decoding(
        max_new_tokens=args.max_new_tokens,
        sample=is_drawn,
        temperature=args.temperature or 1.0,
        top_p=1.0 if args.top_p is None else args.top_p,
        seed=args.seed,
    )
    from megamm.chat.answering import Answerer
    from megamm.engine import groups
    from megamm.inference import load

    answerer = Answerer(load(args.checkpoint))
    answerer.check_system(args.system)
    for image in args.image:
        answerer.check_picture(image)
    name = str(args.checkpoint)
    try:
        return _serve(args, answerer, decoding, name) if args.web else _talk(args, answerer, decoding, name)
    finally:
        groups.shutdown()


def _check_gradio() -> None:
    """Raise InputError if the page cannot be served; importing gradio itself takes seconds."""
    try:
        version = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        raise InputError(f"--web: gradio is not installed; install it: {_INSTALL}") from None
    if version.partition(".")[0] != "6":
        raise InputError(f"--web: gradio {version} is installed, and the page needs 6; {_INSTALL}")


def _talk(args: argparse.Namespace, answerer: Any, decoding: Any, name: str) -> int:
    from megamm.chat.conversation import Conversation
    from megamm.chat.terminal import Terminal

    conversation = Conversation(args.system, answerer.has_memory)
    return Terminal(answerer, decoding, conversation, args.image).run(name)


def _serve(args: argparse.Namespace, answerer: Any, decoding: Any, name: str) -> int:
    from megamm.chat.web import serve

    serve(answerer, decoding, args.system, args.image, name, args.host, args.port)
    return 0
