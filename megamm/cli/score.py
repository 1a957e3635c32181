"""megamm score: predictions against references, as the benchmarks' own evaluators compare them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megamm.cli.common import add_command, add_json, print_json

METRICS = ("vqa", "gqa", "pope", "mme", "mmbench", "scienceqa", "mmmu", "caption")
VQA_RULES = ("always", "github")
ROWS = """\
rows, as JSON lines or a JSON list:
  predictions  {"id": 1, "prediction": "a cat"}; also the results of VQA (question_id, answer), COCO
               (image_id, caption), GQA (questionId, prediction) and MMMU (an object of ids)
  references   vqa        {"id", "answers": ["cat", ...]}; also "answer_type"
               caption    {"id", "references": ["a cat sits", ...]}; also COCO's annotations
               gqa        {"id", "label": "cat"}; also "types"
               pope       {"id", "label": "yes"}; also "split"
               mme        {"id", "label": "yes", "task": "count", "image": "1.jpg"}
               mmbench    {"id": index, "label": "A", "A": "cat", "B": "dog"}; also "category", "l2-category"
               scienceqa  {"id", "label": "A"}; also "choices", "image" or "has_image"
               mmmu       {"id", "label": "A", "options": ["cat", ...]}; without options: an open question
ids are whole numbers or text, 1 and "1" being the same; an id that stands twice is an error. Questions
without a prediction count as wrong and are reported. Predictions for unknown ids are an error of vqa,
caption, pope and mmmu, and counted by the others.
"""


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "score",
        score,
        "score predictions as the benchmarks' own evaluators do",
        "megamm score --metric vqa --predictions predictions.jsonl --references references.jsonl",
    )
    parser.epilog = f"{parser.epilog}\n\n{ROWS}"
    parser.add_argument("--metric", choices=METRICS, required=True, metavar="M", help="%(choices)s")
    parser.add_argument(
        "--predictions",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        metavar="P.jsonl",
        help="what the model answered; several files are runs: their mean and standard deviation",
    )
    parser.add_argument("--references", required=True, type=Path, metavar="R.jsonl", help="the right answers")
    parser.add_argument(
        "--vqa-rule",
        choices=VQA_RULES,
        default="always",
        help="of vqa: normalise always, as the servers do (default), or as VQA's script on GitHub does: not"
        " where all people gave the same answer",
    )
    add_json(parser)


def score(args: argparse.Namespace) -> int:
    """Run `megamm score`."""
    from megamm.evaluation.scores import Runs, as_text, read_rows, score_rows

    references = read_rows(args.references)
    runs = [score_rows(args.metric, read_rows(path), references, args.vqa_rule) for path in args.predictions]
    if len(runs) == 1:
        print_json(runs[0].as_dict()) if args.json else print(as_text(runs[0]))
        return 0
    several = Runs(runs, [str(path) for path in args.predictions])
    print_json(several.as_dict()) if args.json else print(several.as_text())
    return 0
