"""Asking a trained model the questions of a data set, and scoring what it answers."""

from megamm.evaluation.evaluate import Settings, evaluate, report
from megamm.evaluation.metrics import Score, exact_match, score

__all__ = ["Score", "Settings", "evaluate", "exact_match", "report", "score"]
