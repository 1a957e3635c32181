"""GQA accuracy (Hudson and Manning 2019; eval.py of the data set): the answer has to be the one that is
expected.

The prediction loses full stops at its end and its capital letters before, as LLaVA's convert_gqa_for_eval.py
has it; nothing else is forgiven. References that say "isBalanced": false are left out, as the evaluator does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megamm.evaluation.scores.pairing import Question, paired, text_label
from megamm.evaluation.scores.result import Scores, accuracy_by, percent

_OPEN = "query"  # the structural type whose questions are open; the others have two answers to choose from


def score_gqa(predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> Scores:
    """Accuracy; where references have "types", also of binary and open questions and by either type.

    Args:
        references: {"id", "label"} or {"id", "answer"[, "types": {"structural", "semantic"}]}.
    Raises:
        InputError: of `paired`; a label that is no text. Predictions without a reference are counted only:
            those for the whole data set serve for its balanced part.
    """
    balanced = (row for row in references if not _is_unbalanced(row))
    pairs = paired(predictions, balanced, strict=False)
    values = [float(_is_right(question)) for question in pairs.questions]
    numbers: dict[str, float | None] = {"accuracy": percent(values)}
    groups = {}
    for kind in ("structural", "semantic"):
        kinds = [_type(question, kind) for question in pairs.questions]
        found = accuracy_by(zip(kinds, values, strict=True))
        if found and kind == "structural":
            marked = [(name == _OPEN, value) for name, value in zip(kinds, values, strict=True) if name]
            numbers |= {
                "binary": percent(value for is_open, value in marked if not is_open),
                "open": percent(value for is_open, value in marked if is_open),
            }
        if found:
            groups[f"by_{kind}_type"] = found
    return Scores("gqa", numbers, pairs.counts, groups)


def converted(text: str) -> str:
    """A prediction as it is compared."""
    return text.rstrip(".").lower()


def _is_right(question: Question) -> bool:
    expected = text_label(question)
    return question.prediction is not None and converted(question.prediction) == expected


def _is_unbalanced(row: Mapping[str, Any]) -> bool:
    return isinstance(row, Mapping) and row.get("isBalanced") is False


def _type(question: Question, kind: str) -> str | None:
    types = question.row.get("types")
    if types is None:
        return None
    if not isinstance(types, Mapping) or not isinstance(types.get(kind), str | None):
        question.fail('"types" is no object of texts; give {"structural": ..., "semantic": ...}')
    return types.get(kind)
