"""`megamm evaluate --task T` from its data to its files and its score.

Each copy of the model answers its share of the batches into a file of its own; when all have come to the end,
rank 0 puts the answers together in the order of the questions.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

from megamm.config import Recipe
from megamm.errors import InputError
from megamm.evaluation.evaluate import check_same_model, write_rows
from megamm.evaluation.tasks.asking import AnsweringModel, Exam, ask, plan_batches
from megamm.evaluation.tasks.few_shot import Prompt, draw_pool, few_shot_prompt
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.partial import AnswerFile, Row, partial_files, partial_path, read_partials
from megamm.evaluation.tasks.pictures import check_folders
from megamm.evaluation.tasks.progress import progress
from megamm.evaluation.tasks.prompts import Prompts, question_text
from megamm.evaluation.tasks.ranks import together, told_by_rank_0
from megamm.evaluation.tasks.registry import TASKS, Task, read_items
from megamm.evaluation.tasks.scoring import (
    Result,
    Scorer,
    missing_for_score,
    official,
    reference_rows,
    references_path,
    rehearse,
    run_path,
    score_run,
)
from megamm.evaluation.tasks.settings import TaskSettings, check_template, decoding_of, fitting_prompts
from megamm.evaluation.tasks.submission import check_submission, write_submission

Fingerprint = dict[str, Any]
Loader = Callable[[Path, TaskSettings], AnsweringModel]


def evaluate_task(
    recipe: Recipe,
    checkpoint: Path,
    task: str,
    data: Sequence[Path],
    out: Path,
    settings: TaskSettings,
) -> Result | None:
    """Ask the questions of a benchmark, write predictions and references, and score them.

    Args:
        recipe: of the model; refused if the checkpoint holds another model.
        checkpoint: a checkpoint or a run directory.
        task: a name in TASKS.
        data: files of the benchmark, or its folder.
        out: of the predictions, a JSON-lines file of {"id", "prediction", ...}.
    Returns:
        What was found; None on all ranks but the first.
    Raises:
        InputError: wrong data, settings or checkpoint; found before the first question.
        RunError: the disk is full, or another rank has failed.
    """
    from megamm.engine.checkpoint import read_recipe, resolve

    examination = prepare(recipe, task, data, out, settings)
    missing = missing_for_score(examination.task, examination.references)
    if missing and os.environ.get("RANK", "0") == "0":
        print(f"megamm: {missing}", file=sys.stderr)
    found = resolve(checkpoint)
    stored = read_recipe(found)
    check_same_model(recipe.model, stored.model, found)
    examination.fingerprint["checkpoint"] = _digest_of(found / "manifest.json")
    return examination.take(_load(found, settings), official)


def _digest_of(path: Path) -> str:
    """The manifest names the bytes of every file of a checkpoint, so its own stand for them all."""
    try:
        return sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); use another checkpoint") from None


def _load(checkpoint: Path, settings: TaskSettings) -> AnsweringModel:
    from megamm import inference

    return inference.load(checkpoint, tensor=settings.tensor, pipeline=settings.pipeline)


def prepare(
    recipe: Recipe, task: str, data: Sequence[Path], out: Path, settings: TaskSettings
) -> Examination:
    """Read the benchmark and check everything that can be checked without the model.

    Raises:
        InputError: as of `evaluate_task`.
    """
    if task not in TASKS:
        raise InputError(f"--task: {task} is not a task; use {', '.join(['exact_match', *TASKS])}")
    chosen = TASKS[task]
    if settings.submission is not None:
        check_submission(chosen, settings.submission)
    prompts = fitting_prompts(recipe, chosen, settings)
    items = read_items(chosen, data, settings.images, settings.limit)
    for kind in {item.kind for item in items}:
        decoding_of(prompts, kind, chosen, settings, 0)  # raises what is wrong with it
    check_template(recipe, prompts, chosen, items)
    check_folders((image for item in items for image in item.images), task)
    return Examination(chosen, prompts, items, out, settings, recipe.data.image.max_pixels)


class Examination:
    """A benchmark that is ready to be asked.

    Attributes:
        references: rows of those questions whose answers are published.
        fingerprint: of what answers depend on; those of another one are not gone on with.
    """

    def __init__(
        self,
        task: Task,
        prompts: Prompts,
        items: list[Item],
        out: Path,
        settings: TaskSettings,
        max_pixels: int,
    ) -> None:
        self.task, self._prompts, self._items = task, prompts, items
        self._out, self._settings, self._max_pixels = out, settings, max_pixels
        self._paths = [run_path(out, run, settings.runs) for run in range(settings.runs or 1)]
        self.references = reference_rows(items)
        self._marks: list[Fingerprint] = []
        self.fingerprint: Fingerprint = {"task": task.name}

    def take(self, model: AnsweringModel, scorer: Scorer) -> Result | None:
        """Have the model answer, and write and score its answers; None on all ranks but the first.

        Raises:
            InputError: answers of another evaluation stand in the way. RunError: as of `evaluate_task`.
        """
        with together(lambda: self._finish(scorer)) as results:
            exams = [self._exam(run) for run in range(len(self._paths))]
            self._marks = [self._fingerprint(exam) for exam in exams]
            known = told_by_rank_0(lambda: self._answered(scorer))
            for path, exam, mark, done in zip(self._paths, exams, self._marks, known, strict=True):
                self._answer(model, exam, path, mark, done)
        return results[0] if results else None

    def _answered(self, scorer: Scorer) -> list[set[int]]:
        """The questions that each run has answered in earlier attempts."""
        rehearse(scorer, self.task, self.references, self._settings.vqa_rule)
        known = zip(self._paths, self._marks, strict=True)
        return [set(read_partials(path, mark, len(self._items))) for path, mark in known]

    def _exam(self, run: int) -> Exam:
        task, settings = self.task, self._settings
        words = [self._prompts.of(item.kind, task.name) for item in self._items]
        kinds = {item.kind for item in self._items}
        decoding = {kind: decoding_of(self._prompts, kind, task, settings, run) for kind in kinds}
        if self._prompts.shots is None:
            texts = [question_text(each, item) for each, item in zip(words, self._items, strict=True)]
            prompts = [Prompt(text, item.images) for text, item in zip(texts, self._items, strict=True)]
        else:
            prompts = self._demonstrated(settings.seed + run)
        return Exam(
            items=self._items,
            prompts=prompts,
            words=words,
            decoding=[decoding[item.kind] for item in self._items],
            completes=self._prompts.shots is not None,
            max_pixels=self._max_pixels,
        )

    def _demonstrated(self, seed: int) -> list[Prompt]:
        how, settings, task = self._prompts.shots, self._settings, self.task
        assert how is not None
        shots = settings.shots or 0
        asked = {item.id for item in self._items}
        training = (
            item
            for item in task.read(settings.demonstrations, settings.images, "train")
            if item.id not in asked
        )
        pool = draw_pool(training, seed, shots or how.blind, need_images=shots > 0)
        return [
            few_shot_prompt(item, self._prompts.of(item.kind, task.name), how, pool, shots, seed)
            for item in self._items
        ]

    def _fingerprint(self, exam: Exam) -> Fingerprint:
        digest = blake2b(digest_size=16)
        for item, prompt in zip(exam.items, exam.prompts, strict=True):
            names = [Path(image.name).name for image in prompt.images]
            digest.update(repr((item.id, prompt.text, names)).encode("utf-8", "replace"))
        mark = self.fingerprint | {"data and prompts": digest.hexdigest()}
        kinds = {item.kind: vars(each) for item, each in zip(exam.items, exam.decoding, strict=True)}
        mark["decoding"] = dict(sorted(kinds.items()))
        written: Fingerprint = json.loads(json.dumps(mark))  # as it comes back from a file
        return written

    def _answer(
        self, model: AnsweringModel, exam: Exam, path: Path, mark: Fingerprint, done: set[int]
    ) -> None:
        """Answer this copy's share of the batches that are not answered yet."""
        share = [*enumerate(plan_batches(exam, self._settings.batch_size))][model.copy :: model.num_copies]
        left = [(number, batch) for number, batch in share if not done.issuperset(batch)]
        total, waiting = (sum(len(batch) for _, batch in each) for each in (share, left))
        shows = model.is_spokesman and model.copy == 0 and left
        with progress(total, total - waiting, model.num_copies) if shows else nullcontext() as advance:
            file = None
            if model.is_spokesman:
                file = AnswerFile(partial_path(path, model.copy, model.num_copies), mark)
            try:
                for rows in ask(model, exam, left):
                    if file is not None:
                        file.append(rows)
                    if advance is not None:
                        advance(len(rows))
            finally:
                if file is not None:
                    file.close()

    def _finish(self, scorer: Scorer) -> Result:
        """On rank 0: the answers of all copies in the order of the questions, and what they are worth."""
        task, rule, references = self.task, self._settings.vqa_rule, self.references
        runs = [self._whole(path, mark) for path, mark in zip(self._paths, self._marks, strict=True)]
        if references:
            write_rows(references_path(self._out), references)
        for number, (path, rows) in enumerate(zip(self._paths, runs, strict=True)):
            write_rows(path, rows)
            self._submit(number, rows)
        named = [*zip(self._paths, runs, strict=True)] if references else []
        scores = [score_run(scorer, task, path, rows, references, rule) for path, rows in named]
        for path in self._paths:
            for partial in partial_files(path):
                partial.unlink()
        problems = [[row["problem"] for row in rows if "problem" in row] for rows in runs]
        return Result(
            task=task,
            paths=self._paths,
            scores=scores,
            num_questions=len(self._items),
            not_asked=[len(each) for each in problems],
            first_problem=next((problem for each in problems for problem in each), ""),
        )

    def _submit(self, run: int, rows: Sequence[Row]) -> None:
        if self._settings.submission is None:
            return
        place = run_path(self._settings.submission, run, self._settings.runs)
        answers = [(item, row["prediction"]) for item, row in zip(self._items, rows, strict=True)]
        write_submission(self.task, place, answers)

    def _whole(self, path: Path, mark: Fingerprint) -> list[Row]:
        rows = read_partials(path, mark, len(self._items))
        return [rows[index] for index in range(len(self._items))]
