"""VQA accuracy (VQAv2, OKVQA, TextVQA, VizWiz): agreement with ten people (Antol et al. 2015).

An answer is compared with the answers of all people but one, min(matches / 3, 1), for each one that may be
left out; the score is the mean. With more or fewer answers than ten the rule is the same. (A single one
leaves nobody to agree with, and scores 0.)

Rule "always" normalises both sides, as the evaluation servers do; "github" is that of vqaEval.py: where all
people gave the same answer, nothing is normalised, and letters and full stops count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megamm.evaluation.scores.pairing import Question, group_name, paired
from megamm.evaluation.scores.result import Scores, accuracy_by, percent
from megamm.evaluation.scores.vqa_text import normalised, trimmed

RULES = ("always", "github")
_NEEDED = 3  # people who have to agree for the full score
_KINDS = ("answer_type", "question_type")


def score_vqa(
    predictions: Iterable[Mapping[str, Any]], references: Iterable[Mapping[str, Any]], rule: str = "always"
) -> Scores:
    """Accuracy of answers; by "answer_type" and "question_type" too, where references have them.

    Args:
        references: {"id", "answers": [text, ...]}, or answers as VQA has them ({"answer": text, ...}).
    Raises:
        InputError: of `paired`; also for a prediction without a reference, as VQA's evaluator demands;
            answers that are no texts.
    """
    pairs = paired(predictions, references, strict=True)
    values = [_accuracy(question, rule) for question in pairs.questions]
    groups = {}
    for kind in _KINDS:
        found = accuracy_by(
            (group_name(question, kind), value)
            for question, value in zip(pairs.questions, values, strict=True)
        )
        if found:
            groups[f"by_{kind}"] = found
    return Scores("vqa", {"accuracy": percent(values)}, pairs.counts, groups)


def _accuracy(question: Question, rule: str) -> float:
    answers = _answers(question)
    return 0.0 if question.prediction is None else agreement(question.prediction, answers, rule)


def agreement(prediction: str, answers: Sequence[str], rule: str = "always") -> float:
    """Score of one answer, between 0 and 1."""
    people = [trimmed(answer) for answer in answers]
    given = trimmed(prediction)
    if rule == "always" or len(set(people)) > 1:
        people, given = [normalised(answer) for answer in people], normalised(given)
    matches, total = people.count(given), len(people)
    # each of those who match leaves one match less to the others
    with_match_left_out, with_other_left_out = min(1.0, (matches - 1) / _NEEDED), min(1.0, matches / _NEEDED)
    return (matches * with_match_left_out + (total - matches) * with_other_left_out) / total


def _answers(question: Question) -> list[str]:
    answers = question.row.get("answers")
    if not isinstance(answers, list | tuple) or not answers:
        question.fail('has no "answers"; give the list of what people answered')
    texts: list[str] = []
    for answer in answers:
        text = answer.get("answer") if isinstance(answer, Mapping) else answer
        if not isinstance(text, str):
            question.fail(f'"answers" holds {text!r}; give texts')
        texts.append(text)
    return texts
