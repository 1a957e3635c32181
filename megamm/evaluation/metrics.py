"""Scores of predictions against the answers of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tally:
    """How many of `total` questions were answered correctly."""

    correct: int = 0
    total: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.total if self.total else 0.0

    def plus(self, is_correct: bool) -> Tally:
        return Tally(self.correct + is_correct, self.total + 1)

    def as_dict(self) -> dict[str, float | int]:
        return {"accuracy": self.accuracy, "correct": self.correct, "n": self.total}


@dataclass(frozen=True)
class Score:
    """Accuracy over all questions and over each kind of question (in order of appearance)."""

    overall: Tally = Tally()
    kinds: Mapping[str, Tally] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        kinds = {kind: tally.as_dict() for kind, tally in self.kinds.items()}
        return self.overall.as_dict() | {"kinds": kinds}


def exact_match(prediction: str, answer: str) -> bool:
    """Equal but for white space around them; case and punctuation count."""
    return prediction.strip() == answer.strip()


def score(rows: Iterable[Mapping[str, Any]]) -> Score:
    """The score of rows with "correct" and, where questions have kinds, "kind"."""
    overall, kinds = Tally(), dict[str, Tally]()
    for row in rows:
        overall = overall.plus(row["correct"])
        if (kind := row.get("kind")) is not None:
            kinds[kind] = kinds.get(kind, Tally()).plus(row["correct"])
    return Score(overall, kinds)
