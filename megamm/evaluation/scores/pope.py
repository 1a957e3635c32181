"""POPE: does the model see objects that are not there? (Li et al. 2023; evaluate.py of POPE, eval_pope.py of
LLaVA.)

Only the first sentence of a prediction counts, up to the first full stop. It is "no" if one of its words,
after commas are removed and as spaces separate them, is exactly No, no or not; anything else is "yes", an
empty answer too. A question without a prediction counts as the wrong answer everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megamm.evaluation.scores.pairing import Question, group_name, paired, text_label
from megamm.evaluation.scores.result import Numbers, Scores

_NO = frozenset({"No", "no", "not"})
NAMES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


def score_pope(predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]]) -> Scores:
    """Accuracy, precision and recall of "yes", F1, and how often the answer was "yes".

    Args:
        references: {"id", "label": "yes" or "no"[, "split": "random", "popular" or "adversarial"]}. With
            splits, the headline is the mean over them.
    Raises:
        InputError: of `paired`; also for a prediction without a reference; a label that is neither; some with
            a split and some without.
    """
    pairs = paired(predictions, references, strict=True)
    splits: dict[str | None, list[Question]] = {}
    for question in pairs.questions:
        splits.setdefault(_split(question), []).append(question)
    if len(splits) > 1 and None in splits:
        splits[None][0].fail('has no "split", which others have; give all of them one, or none')
    parts = {name: _Confusion.of(questions) for name, questions in splits.items()}
    numbers: Numbers = {
        name: sum(part.numbers()[name] for part in parts.values()) / len(parts) for name in NAMES
    }
    groups = (
        {}
        if None in parts
        else {"by_split": {str(name): {**part.numbers(), "n": part.total} for name, part in parts.items()}}
    )
    return Scores("pope", numbers, pairs.counts, groups)


def says_yes(text: str) -> bool:
    """Whether a prediction counts as "yes"."""
    sentence = text.split(".", 1)[0].replace(",", "")
    return _NO.isdisjoint(sentence.split(" "))


@dataclass(frozen=True)
class _Confusion:
    """How many answers were rightly yes, wrongly yes, rightly no and wrongly no."""

    true_yes: int
    false_yes: int
    true_no: int
    false_no: int

    @classmethod
    def of(cls, questions: Sequence[Question]) -> _Confusion:
        counts = {(said, right): 0 for said in (True, False) for right in (True, False)}
        for question in questions:
            expected = _expects_yes(question)
            said = not expected if question.prediction is None else says_yes(question.prediction)
            counts[said, said == expected] += 1
        return cls(counts[True, True], counts[True, False], counts[False, True], counts[False, False])

    @property
    def total(self) -> int:
        return self.true_yes + self.false_yes + self.true_no + self.false_no

    def numbers(self) -> dict[str, float]:
        """In percent; 0 where nothing can be divided by."""
        said, expected = self.true_yes + self.false_yes, self.true_yes + self.false_no
        return {
            "accuracy": 100.0 * (self.true_yes + self.true_no) / self.total,
            "precision": 100.0 * self.true_yes / said if said else 0.0,
            "recall": 100.0 * self.true_yes / expected if expected else 0.0,
            "f1": 100.0 * 2 * self.true_yes / (said + expected) if self.true_yes else 0.0,
            "yes_ratio": 100.0 * said / self.total,
        }


def _split(question: Question) -> str | None:
    """LLaVA's question file calls it "category"."""
    return group_name(question, "split") or group_name(question, "category")


def _expects_yes(question: Question) -> bool:
    expected = text_label(question).strip().lower()
    if expected not in ("yes", "no"):
        question.fail(f"the label is {expected!r}; give yes or no")
    return expected == "yes"
