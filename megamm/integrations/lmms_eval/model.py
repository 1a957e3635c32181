"""The model that lmms-eval asks: a checkpoint of megamm, or an exported Hugging Face directory."""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.utils import simple_parse_args_string

from megamm.data.templates import Template
from megamm.errors import InputError
from megamm.inference import Decoding, Model, load
from megamm.inference.asking import Asking
from megamm.inference.continuations import likelihoods
from megamm.inference.questions import as_questions
from megamm.integrations.lmms_eval.requests import Asked, asked, decoding_of, question

log = logging.getLogger("megamm")


class Megamm(lmms):
    """A checkpoint that answers the requests of lmms-eval.

    Several processes (of torchrun) are as many copies of the model, of which each answers
    its share of the documents; a model is not divided over processes here.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        device: str | None = None,
        precision: str | None = None,
        template: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """
        Args:
            checkpoint: a checkpoint, a run directory, or a Hugging Face directory that megamm can import.
            batch_size: requests that are answered at once.
            device: "cpu" or "cuda"; None: a GPU where there is one.
            precision: "fp32" or "bf16"; None: the one that it was trained in.
            template: prompt template, if not that of the checkpoint.
            max_batch_size: given by lmms-eval for batch sizes that it would find out; without use here.
        Raises:
            InputError: the checkpoint cannot be used, or a value is not one of these.
        """
        super().__init__()
        self.batch_size = _whole(batch_size)
        if precision not in (None, "fp32", "bf16"):
            raise InputError(f"precision: {precision!r} is unknown; use fp32 or bf16")
        kind = (device or "auto").partition(":")[0]
        self._model = _open(Path(str(checkpoint)).expanduser(), kind, precision)
        if self._model.tokenizer is None:
            raise InputError(f"{checkpoint}: has no tokenizer; import it again with --tokenizer")
        self._model.template = as_questions(Template.by_name(template) if template else self._model.template)
        self._asking = Asking.of(self._model.recipe, self._model.tokenizer, self._model.template)
        self._rank, self._world_size = self._model.copy, self._model.num_copies

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> Megamm:
        """As of lmms, but a batch size among the model's arguments counts more than the option's (whose
        default is always there too)."""
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        given |= simple_parse_args_string(arg_string)
        if "checkpoint" not in given:
            raise InputError("--model_args: names no checkpoint; write checkpoint=DIR")
        try:
            return cls(**given)
        except TypeError as error:
            raise InputError(
                f"--model_args: {error}; it takes checkpoint, batch_size, precision and template"
            ) from None

    @property
    def device(self) -> torch.device:
        """Where lmms-eval puts the numbers that ranks exchange."""
        return self._model.device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answer to each request."""
        questions, decodings = [], []
        repeats: Counter[int] = Counter()  # a task that wants several answers repeats its request
        for request in requests:
            context, settings, visuals, *where = request.args
            questions.append(asked(context, visuals, self.task_dict, where))
            decodings.append(replace(decoding_of(settings), seed=repeats[id(request)]))
            repeats[id(request)] += 1
        answers = [""] * len(requests)
        for decoding, rows in _batches(questions, decodings, self.batch_size):
            for row, answer in zip(
                rows, self._answers([questions[row] for row in rows], decoding), strict=True
            ):
                answers[row] = answer
        return answers

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """The answers of all rounds of each request: the task makes each question from the answers before."""
        return [self._rounds(*request.args) for request in requests]

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """Of each request a number for its continuation, and whether greedy decoding gives that.

        The number is what lmms-eval 0.7 makes of it: of the choices of a question it takes the one with the
        *lowest* (`Task.process_results` says "we just use the argmin"), so for those it is the negative
        log-probability, in nats, summed over the tokens. For `output_type: loglikelihood`, from which a
        perplexity is made, it is the log-probability. The pair is wrapped, because the evaluator of 0.7
        makes a text of a bare one (`unwrap_generation_output`).
        """
        questions, texts, signs = [], [], []
        for context, target, *rest in (request.args for request in requests):
            visuals, where = (rest[0], rest[1:]) if rest else (None, [])
            questions.append(asked(context, visuals, self.task_dict, where))
            signs.append(1.0 if callable(target) else -1.0)
            number, task, split = where or (None, None, None)
            texts.append(str(target(self.task_dict[task][split][number]) if callable(target) else target))
        found = []
        for start in range(0, len(requests), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._likelihoods(questions[part], texts[part])
        pairs = [(sign * number, greedy) for sign, (number, greedy) in zip(signs, found, strict=True)]
        return [GenerationResult(pair) for pair in pairs]

    def _likelihoods(self, questions: Sequence[Asked], texts: Sequence[str]) -> list[tuple[float, bool]]:
        try:
            turns, pictures = [one.turns for one in questions], [one.pictures for one in questions]
            found = likelihoods(self._model, turns, pictures, texts)
            return [(one.log_probability, one.is_greedy) for one in found]
        except InputError as error:
            if len(questions) > 1:  # which of them is it?
                return [
                    pair
                    for one, text in zip(questions, texts, strict=True)
                    for pair in self._likelihoods([one], [text])
                ]
            log.warning("%s: %s; taken as impossible", questions[0].name, error)
            return [(float("-inf"), False)]

    def _rounds(
        self,
        context: Any,
        settings: Any,
        visuals: Any,
        next_question: Any,
        number: Any,
        task: str,
        split: str,
    ) -> list[str]:
        document = self.task_dict[task][split][number]
        current = asked(context, visuals, self.task_dict, (number, task, split))
        answers: list[str] = []
        notes: Any = None
        for number_of_round in itertools.count(1):
            answers += self._answers([current], decoding_of(settings))
            shown, text, is_over, kept, notes = next_question(
                document, previous_output=answers, round_idx=number_of_round, previous_round_info=notes
            )
            answers = list(kept)
            if is_over:
                break
            current = question(current.name, text, shown)
        return answers

    def _answers(self, questions: Sequence[Asked], decoding: Decoding) -> list[str]:
        """Answers, each no longer than there is room behind its prompt; nothing where there is none."""
        most, longest = self._asking.max_positions, decoding.max_new_tokens
        rooms = [most - len(self._asking.prompt(one.turns)) for one in questions]
        answers = [""] * len(questions)
        together = [row for row, room in enumerate(rooms) if room >= longest]
        for rows in [together, *([row] for row, room in enumerate(rooms) if 0 < room < longest)]:
            turns, pictures = (
                [questions[row].turns for row in rows],
                [questions[row].pictures for row in rows],
            )
            length = min([longest, *(rooms[row] for row in rows)])
            found = self._model.generate(turns, pictures, length, decoding)
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
        for row, room in enumerate(rooms):
            if room <= 0:
                name = questions[row].name
                log.warning("%s: %d positions, the model has %d; not answered", name, most - room, most)
        return answers


def _batches(
    questions: Sequence[Asked], decodings: Sequence[Decoding], size: int
) -> Iterator[tuple[Decoding, list[int]]]:
    """Rows that are decoded alike, in batches of prompts of like length, the longest first."""
    for decoding in dict.fromkeys(decodings):
        rows = [row for row, other in enumerate(decodings) if other == decoding]
        rows.sort(key=lambda row: (-len(questions[row].pictures), -len(questions[row].turns[0].text)))
        for start in range(0, len(rows), size):
            yield decoding, rows[start : start + size]


def _open(path: Path, device: str, precision: Any) -> Model:
    """The model of a checkpoint; a Hugging Face directory is imported into a temporary one first."""
    if not (path / "config.json").is_file():
        return load(path, device, precision)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"{path}: is a Hugging Face directory, which every process would import for itself; run "
            f"`megamm convert import --from {path} --out CKPT` once and give that checkpoint"
        )
    from megamm.convert import import_checkpoint

    with TemporaryDirectory(prefix="megamm-") as scratch:
        return load(
            import_checkpoint([path], Path(scratch) / "checkpoint", report=log.info), device, precision
        )


def _whole(batch_size: int | str) -> int:
    try:
        number = int(batch_size)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"batch_size: {batch_size!r}; use a whole number above 0")
    return number
