"""The metrics by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from megamm.errors import InputError
from megamm.evaluation.scores.caption import score_caption
from megamm.evaluation.scores.gqa import score_gqa
from megamm.evaluation.scores.mmbench import score_mmbench
from megamm.evaluation.scores.mme import score_mme
from megamm.evaluation.scores.mmmu import score_mmmu
from megamm.evaluation.scores.pope import score_pope
from megamm.evaluation.scores.result import Scores
from megamm.evaluation.scores.scienceqa import score_scienceqa
from megamm.evaluation.scores.vqa import RULES, score_vqa

Rows = Iterable[Mapping[str, Any]]
_SCORERS: dict[str, Callable[[Rows, Rows], Scores]] = {
    "vqa": score_vqa,
    "gqa": score_gqa,
    "pope": score_pope,
    "mme": score_mme,
    "mmbench": score_mmbench,
    "scienceqa": score_scienceqa,
    "mmmu": score_mmmu,
    "caption": score_caption,
}
METRICS = tuple(_SCORERS)


def score_rows(metric: str, predictions: Rows, references: Rows, vqa_rule: str = "always") -> Scores:
    """Score predictions against references.

    Args:
        metric: one of `METRICS`.
        predictions: {"id", "prediction"}.
        references: {"id", "answers"}, {"id", "references"} or {"id", "label"}, and what else the metric
            takes. vqa_rule: of `vqa` alone: "always" or "github".
    Raises:
        InputError: rows that the metric cannot take, an unknown metric or rule.
        RunError: a program that `caption` uses failed.
    """
    if metric not in _SCORERS:
        raise InputError(f"metric: {metric!r} is unknown; use {', '.join(METRICS)}")
    if vqa_rule not in RULES:
        raise InputError(f"vqa_rule: {vqa_rule!r} is unknown; use {' or '.join(RULES)}")
    scorer = partial(score_vqa, rule=vqa_rule) if metric == "vqa" else _SCORERS[metric]
    return scorer(predictions, references)
