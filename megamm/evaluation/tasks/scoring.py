"""The score of an evaluation: what `megamm score` computes from the files that were written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamm.errors import InputError
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.partial import Row
from megamm.evaluation.tasks.registry import Task

if TYPE_CHECKING:
    from megamm.evaluation.scores import Runs, Scores

# (metric, predictions, references, rule of VQA)
Scorer = Callable[[str, Sequence[Row], Sequence[Row], str], "Scores"]


def official(metric: str, predictions: Sequence[Row], references: Sequence[Row], vqa_rule: str) -> Scores:
    """What `megamm score` computes."""
    from megamm.evaluation.scores import score_rows

    return score_rows(metric, predictions, references, vqa_rule)


def reference_rows(items: Sequence[Item]) -> list[Row]:
    """The references of those items whose answers are published."""
    return [{"id": item.id, **item.reference} for item in items if item.reference is not None]


def references_path(out: Path) -> Path:
    """Where the references of predictions stand: PRED.references.jsonl for PRED.jsonl."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.references.jsonl")


def run_path(out: Path, run: int, runs: int | None) -> Path:
    """Where a file of one run stands: PRED.run0.jsonl, ..., or PRED.jsonl of a single one."""
    return out if runs is None else out.with_name(f"{out.stem}.run{run}{out.suffix}")


def missing_for_score(task: Task, references: Sequence[Row]) -> str:
    """What the metrics of captions run and this machine lacks, in words; "" if nothing."""
    if task.metric != "caption" or not references:
        return ""
    from megamm.evaluation.scores.java import java, package_folder

    try:
        package_folder()
        java()
    except InputError as error:
        return f"{error}; until then captions are written and not scored"
    return ""


def rehearse(scorer: Scorer, task: Task, references: Sequence[Row], rule: str) -> None:
    """Score an empty answer, so that what is wrong with references is known before the first question is
    asked. Captions, which take their time, have nothing to them that the reader has not checked.

    Raises:
        InputError: as of `megamm score`.
    """
    if references and task.metric != "caption":
        scorer(task.metric, [{"id": references[0]["id"], "prediction": ""}], references, rule)


def score_run(
    scorer: Scorer, task: Task, path: Path, rows: Sequence[Row], references: Sequence[Row], rule: str
) -> Scores:
    """The score of those predictions whose answers are published.

    Args:
        path: of the predictions, for errors: they have been written.
    Raises:
        InputError: as of `megamm score`.
    """
    known = {row["id"] for row in references}
    try:
        return scorer(task.metric, [row for row in rows if row["id"] in known], references, rule)
    except InputError as error:
        raise InputError(
            f"{error} (the answers stand in {path}; score them with megamm score --metric {task.metric})"
        ) from None


@dataclass(frozen=True)
class Result:
    """What an evaluation found, on rank 0.

    Attributes:
        paths: of the predictions of each run.
        scores: of each run; empty where no answers are published.
        num_questions: of each run.
        not_asked: of each run, questions that could not be asked.
        first_problem: why the first of them could not; "" if there was none.
    """

    task: Task
    paths: Sequence[Path]
    scores: Sequence[Scores]
    num_questions: int
    not_asked: Sequence[int]
    first_problem: str

    def as_dict(self) -> dict[str, Any]:
        """What `megamm score --json` prints, with the numbers of predictions and of questions that were not
        asked."""
        found: dict[str, Any] = {"task": self.task.name, "rows": self.num_questions}
        found["not_asked"] = self.not_asked[0] if len(self.not_asked) == 1 else [*self.not_asked]
        if len(self.scores) > 1:
            return found | self._runs().as_dict()
        return found | (self.scores[0].as_dict() if self.scores else {})

    def report(self) -> str:
        """What `megamm score` prints, and what could not be asked."""
        from megamm.evaluation.scores import as_text

        num_scored = self.scores[0].counts["n"] if self.scores else 0
        lines = []
        if num_scored != self.num_questions:
            lines.append(f"{self.task.name}: {self.num_questions} questions, {num_scored} with known answers")
        if any(self.not_asked):
            lines.append(
                f'{sum(self.not_asked)} could not be asked and have the answer "": {self.first_problem}'
            )
        if not self.scores:
            lines.append(
                "the data hold no answers, so there is no score; --submission writes what the server takes"
            )
        elif len(self.scores) == 1:
            lines.append(as_text(self.scores[0]))
        else:
            lines.append(self._runs().as_text())
        return "\n".join(lines)

    def _runs(self) -> Runs:
        from megamm.evaluation.scores import Runs

        return Runs(self.scores, [str(path) for path in self.paths])
