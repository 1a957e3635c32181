"""megamm generate, megamm evaluate: what a trained model answers."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, add_json, positive, print_json
from megamm.cli.decoding import add_decoding, decoding_of

IMAGE = "<image>"


def add_parsers(commands: Any) -> None:
    """Add the subcommands."""
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
    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "ask the questions of a data set, write the answers and the score",
        "megamm evaluate examples/quickstart/llava.yaml --checkpoint runs/llava --task exact_match"
        " --data heldout.json --out predictions.jsonl",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="recipe of the model")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="--a.b=c",
        help="values that replace those of the recipe; `--a.b` alone stands for `--a.b=true`",
    )
    _add_checkpoint(parser)
    parser.add_argument("--task", choices=("exact_match",), required=True, help="what is asked and scored")
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        required=True,
        metavar="D",
        help="LLaVA JSON with questions (human) and answers (gpt); may be given again",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the pictures (default: that of the data file)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PRED.jsonl", help="predictions to write")
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="questions asked at once (default 32)"
    )
    _add_length(parser)
    add_json(parser)


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


def evaluate(args: argparse.Namespace) -> int:
    """Run `megamm evaluate`."""
    from megamm.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from megamm.evaluation import Settings, evaluate, report

    settings = Settings(args.images, args.batch_size, args.max_new_tokens)
    score = evaluate(recipe, args.checkpoint, args.task, args.data, args.out, settings)
    if args.json:
        print_json(score.as_dict())
    else:
        print(report(score))
    return 0
