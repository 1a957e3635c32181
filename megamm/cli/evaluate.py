"""megamm evaluate: the questions of a data set or of a public benchmark, asked and scored."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, add_json, add_recipe, positive, print_json
from megamm.cli.decoding import NAMES, add_decoding
from megamm.cli.launched import end_with_launcher
from megamm.errors import InputError

EXACT_MATCH = "exact_match"
# Names of megamm.evaluation.tasks.TASKS and of its prompts, which --help must not import.
TASKS = (
    *("coco_caption", "flickr30k", "nocaps", "vqav2", "okvqa", "textvqa", "vizwiz", "gqa", "pope", "mme"),
    *("mmbench", "scienceqa_img", "mmmu"),
)
PROMPTS = ("llava", "infimm", "xcomposer", "caption_only", "open_flamingo")
VQA_RULES = ("always", "github")
# What exact_match has no use for, with the value of an option that is not given.
_BENCHMARKS_ONLY: dict[str, Any] = {
    **dict.fromkeys(["limit", "prompts", "shots", "demonstrations", "runs", "submission"]),
    **dict.fromkeys(["tensor", "pipeline", "vqa_rule"]),
    **dict.fromkeys(NAMES[1:6]),
    **{"sample": False, "stop": []},
}


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "evaluate",
        evaluate,
        "ask the questions of a data set or benchmark, write the answers and the score",
        "megamm evaluate examples/llava15_13b/instruct.yaml --checkpoint runs/llava --task pope"
        " --data POPE/output/coco --images coco --out pope.jsonl",
    )
    add_recipe(parser, "recipe of the model")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="checkpoint or run directory"
    )
    parser.add_argument(
        "--task",
        choices=(EXACT_MATCH, *TASKS),
        required=True,
        metavar="T",
        help="what is asked and scored: %(choices)s",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="PRED.jsonl", help="predictions to write")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="questions asked at once by each copy of the model (default 32)",
    )
    _add_data(parser)
    _add_prompts(parser)
    add_decoding(parser, max_new_tokens=None)
    parser.add_argument(
        "--tensor", type=positive, metavar="N", help="tensor-parallel ranks of a copy (default 1)"
    )
    parser.add_argument(
        "--pipeline", type=positive, metavar="N", help="pipeline stages of a copy (default 1)"
    )
    add_json(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        action="append",
        type=Path,
        required=True,
        metavar="D",
        help="file or folder of the benchmark; exact_match: LLaVA JSON with questions (human) and answers"
        " (gpt); may be given again",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="folder of the pictures (default: that of the data)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="ask the first N questions only")
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="also write what the benchmark's server takes (mme: a folder for its evaluation tool)",
    )
    parser.add_argument(
        "--vqa-rule", choices=VQA_RULES, help="vqav2, okvqa, textvqa, vizwiz: as of `megamm score`"
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        choices=PROMPTS,
        metavar="NAME",
        help="words of the prompts: %(choices)s (default: those of the recipe's template)",
    )
    parser.add_argument(
        "--shots",
        type=_not_negative,
        metavar="K",
        help="few-shot: demonstrations before each question, 0 or more",
    )
    parser.add_argument(
        "--demonstrations",
        action="append",
        type=Path,
        metavar="FILE",
        help="few-shot: file of the training split, in the layout of --data; may be given again",
    )
    parser.add_argument(
        "--runs",
        type=positive,
        metavar="N",
        help="evaluate N times, with seeds that follow each other; mean and standard deviation are reported",
    )


def _not_negative(text: str) -> int:
    """An argparse type: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def evaluate(args: argparse.Namespace) -> int:
    """Run `megamm evaluate`."""
    from megamm.recipe import load_recipe

    if args.task == EXACT_MATCH:
        _refuse_options_of_benchmarks(args)
        return _exact_match(args, load_recipe(args.recipe, args.overrides))
    from megamm.engine.launcher import take_place_from_slurm

    take_place_from_slurm(os.environ)
    end_with_launcher(os.environ)
    return _benchmark(args, load_recipe(args.recipe, args.overrides))


def _refuse_options_of_benchmarks(args: argparse.Namespace) -> None:
    for name, absent in _BENCHMARKS_ONLY.items():
        if getattr(args, name) != absent:
            raise InputError(
                f"--{name.replace('_', '-')}: is for the benchmarks; leave it out, or choose another --task"
            )


def _exact_match(args: argparse.Namespace, recipe: Any) -> int:
    from megamm.evaluation import Settings, evaluate, report

    settings = Settings(args.images, args.batch_size, args.max_new_tokens or 64)
    score = evaluate(recipe, args.checkpoint, args.task, args.data, args.out, settings)
    if args.json:
        print_json(score.as_dict())
    else:
        print(report(score))
    return 0


def _benchmark(args: argparse.Namespace, recipe: Any) -> int:
    from megamm.engine import groups
    from megamm.evaluation.tasks import TaskSettings, evaluate_task

    settings = TaskSettings(
        images=args.images,
        batch_size=args.batch_size,
        limit=args.limit,
        prompts=args.prompts,
        shots=args.shots,
        demonstrations=tuple(args.demonstrations or ()),
        seed=args.seed,
        runs=args.runs,
        submission=args.submission,
        decoding={name: getattr(args, name) for name in NAMES},
        tensor=args.tensor or 1,
        pipeline=args.pipeline or 1,
        vqa_rule=args.vqa_rule or VQA_RULES[0],
    )
    result = evaluate_task(recipe, args.checkpoint, args.task, args.data, args.out, settings)
    if result is not None:  # on the first rank
        print_json(result.as_dict()) if args.json else print(result.report())
    groups.shutdown()
    return 0
