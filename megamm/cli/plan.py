"""megamm plan: whether a stage fits, how long it takes, and in which layout it is fastest."""

from __future__ import annotations

import argparse
from typing import Any

from megamm.cli.common import add_command, add_json, add_recipe, positive, positive_number, print_json
from megamm.errors import InputError

JSON_KEYS = """
--json prints one object; sizes in bytes, times in seconds, rates as shares of 1:
  recipe, stage, gpus, gpu, gpu_memory, fp8
  memory_limit how much of gpu_memory is planned with
  images_per_row, images_in_memory   in a row: on average, for the time; for which there is memory
  layout       of the recipe: tensor, pipeline, virtual_pipeline, pipeline_layout, context, data,
               micro_batch_size, micro_batches, recompute
  error        instead of the next five: the sentence why the recipe's own layout does not work
  parameters   of the whole model by part, and of a rank of each pipeline stage: {total, trained}
  memory       stages: of each pipeline stage by kind, and total; fits: none needs more than memory_limit
  flops        model FLOPs of a step by part; hardware_flops with what is recomputed
  step         seconds, where they go, mfu and hfu (of the dense bf16 peak, also with FP8),
               tokens_per_s_per_gpu, samples_per_s; seconds of each stage
  stage_time   steps, days, gpu_hours
  best         layouts that fit, fastest first: layout, overrides, seconds, mfu, schedule, memory, days
  refused      layouts that do not work: layout, kind (layout, batch, memory), reason, bytes needed
  tried        how many were timed
"""


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "plan",
        plan,
        "say whether a stage fits, how long it takes and which layouts are fastest, without GPU and weights",
        "megamm plan examples/quickstart/llava.yaml --gpus 8 --gpu a100-80gb",
    )
    parser.epilog = f"{parser.epilog}\n{JSON_KEYS}"
    add_recipe(parser, "YAML file of the stage")
    parser.add_argument(
        "--gpus",
        type=positive,
        metavar="N",
        help="how many (default: hardware.gpus, or one copy of the model)",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help="which kind: a100, h100, h200, a100-40gb, ... (default: hardware.gpu)"
    )
    parser.add_argument("--top", type=positive, default=5, metavar="K", help="layouts to propose (default 5)")
    parser.add_argument(
        "--images",
        type=positive_number,
        metavar="N",
        help="images in a row (default: for the time 1, or, if packed, as many as fit with 256 positions of "
        "text each; for the memory as many as there may be)",
    )
    add_json(parser)


def plan(args: argparse.Namespace) -> int:
    """Run `megamm plan`."""
    from megamm.planning.hardware import gpu_by_name
    from megamm.planning.report import plan_of
    from megamm.planning.report_text import text_of
    from megamm.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if recipe.model.assembly in ("language", "vision"):
        raise InputError(f"model.assembly: {recipe.model.assembly} alone is not trained; plan a whole model")
    parallel = recipe.parallel
    one_copy = parallel.tensor * parallel.pipeline * parallel.context
    gpus = args.gpus or recipe.hardware.gpus or one_copy
    gpu = gpu_by_name(args.gpu or recipe.hardware.gpu)
    found = plan_of(recipe, gpus, gpu, args.top, args.images)
    if args.json:
        print_json(found)
    else:
        print(text_of(found))
    return 0
