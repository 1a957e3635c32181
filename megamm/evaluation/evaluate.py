"""`megamm evaluate`: questions in, predictions.jsonl and a score out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megamm.config import UNCOMPARED_KEYS, ModelConfig, Recipe
from megamm.data.questions import Question, read_questions
from megamm.data.templates import Turn
from megamm.errors import InputError
from megamm.evaluation.metrics import Score, exact_match, score
from megamm.whole_files import written_whole

TASKS = ("exact_match",)


class AnsweringModel(Protocol):
    """What evaluation needs of a model: greedy answers to conversations that end in a question."""

    def generate(
        self, conversations: list[list[Turn]], images: list[list[Path]], max_new_tokens: int
    ) -> list[str]: ...


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    Attributes:
        images: folder of the pictures; None means that of the data file.
        batch_size: questions asked at once.
        max_new_tokens: longest answer.
    """

    images: Path | None = None
    batch_size: int = 32
    max_new_tokens: int = 64


def evaluate(
    recipe: Recipe,
    checkpoint: Path,
    task: str,
    data: Sequence[Path],
    out: Path,
    settings: Settings | None = None,
) -> Score:
    """Ask the questions of `data`, write one row for each to `out`, and score them.

    Args:
        recipe: of the model; refused if the checkpoint holds another model.
        checkpoint: a checkpoint or a run directory.
        task: "exact_match": an answer is right if it equals that of the data set.
        data: LLaVA JSON files with the answers in the turns of "gpt".
        out: a JSON-lines file of {"id", "prediction", "question", "answer", "correct"[, "kind"]}.
    Raises:
        InputError: wrong data, task or checkpoint; found before the first question.
    """
    if task not in TASKS:
        raise InputError(f"--task: {task} is not a task; use {', '.join(TASKS)}")
    settings = settings or Settings()
    questions = read_questions(list(data), settings.images)

    from megamm.engine.checkpoint import read_recipe, resolve

    found = resolve(checkpoint)
    check_same_model(recipe.model, read_recipe(found).model, found)
    from megamm.inference import load

    return score(write_rows(out, answered(load(found), questions, settings)))


def check_same_model(wanted: ModelConfig, found: ModelConfig, checkpoint: Path) -> None:
    """Raise InputError, naming the keys, if a checkpoint's model is not the recipe's."""
    ours, theirs = (dict(_leaves(asdict(model), "model")) for model in (wanted, found))
    differing = [f"{key} is {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differing:
        raise InputError(
            f"{checkpoint}: holds another model than the recipe describes ({'; '.join(differing[:3])}); "
            f"give the recipe it was trained with: {checkpoint / 'recipe.yaml'}"
        )


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{key}")
        elif key not in UNCOMPARED_KEYS:
            yield f"{prefix}.{key}", value


def answered(
    model: AnsweringModel, questions: Sequence[Question], settings: Settings
) -> Iterator[dict[str, Any]]:
    """The rows of all questions, in their order."""
    starts = range(0, len(questions), settings.batch_size)
    for start in _with_progress(starts):
        batch = questions[start : start + settings.batch_size]
        images = [q.images for q in batch]
        predictions = model.generate([q.turns for q in batch], images, max_new_tokens=settings.max_new_tokens)
        for question, prediction in zip(batch, predictions, strict=True):
            yield _row(question, prediction)


def _row(question: Question, prediction: str) -> dict[str, Any]:
    row = {
        "id": question.id,
        "prediction": prediction.strip(),
        "question": question.text,
        "answer": question.answer,
        "correct": exact_match(prediction, question.answer),
    }
    return row if question.kind is None else row | {"kind": question.kind}


def _with_progress(items: Sequence[int]) -> Iterable[int]:
    """`items`, with a bar on stderr where that is a terminal (stdout is for results)."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, description="evaluating", console=Console(stderr=True), transient=True)


def write_rows(out: Path, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows as JSON lines; `out` appears when the last one is written. Returns the rows."""
    out.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with written_whole(out) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written.append(row)
    return written


def report(result: Score) -> str:
    """The score as text: overall first, then each kind of question."""
    lines = [f"accuracy: {result.overall.accuracy:.4f} (n={result.overall.total})"]
    for kind, tally in result.kinds.items():
        lines.append(f"  {kind}: {tally.accuracy:.4f} (n={tally.total})")
    return "\n".join(lines)
