"""Asking a model the questions of a benchmark, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megamm.data.image_header import ImageError
from megamm.data.templates import Turn
from megamm.errors import InputError
from megamm.evaluation.tasks.few_shot import Prompt, cut_answer
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.partial import Row
from megamm.evaluation.tasks.pictures import read_picture
from megamm.evaluation.tasks.prompts import Words
from megamm.inference import Decoding

Batch = tuple[int, ...]
_READERS = 2  # threads that read and check pictures while the model computes
_AHEAD = 2  # batches


class AnsweringModel(Protocol):
    """What evaluation needs of `megamm.inference`.

    Attributes:
        num_copies, copy: of the model, and which of them this rank is a part of.
        is_spokesman: whether this rank writes what its copy answers.
    """

    @property
    def num_copies(self) -> int: ...

    @property
    def copy(self) -> int: ...

    @property
    def is_spokesman(self) -> bool: ...

    def generate(
        self,
        conversations: Sequence[Sequence[Turn]],
        images: Sequence[Sequence[str | Path | bytes]],
        *,
        decoding: Decoding,
    ) -> list[str]:
        """Answers to conversations that end in a question (collective in the copy)."""

    def complete(
        self, prompts: Sequence[str], images: Sequence[Sequence[str | Path | bytes]], *, decoding: Decoding
    ) -> list[str]:
        """What follows texts in which `<image>` and control tokens count (collective in the copy)."""


@dataclass(frozen=True)
class Exam:
    """All questions of one run.

    Attributes:
        prompts: of each item.
        words: with which each was made.
        completes: whether prompts are texts to complete, instead of questions.
        max_pixels: larger pictures are not decoded.
    """

    items: Sequence[Item]
    prompts: Sequence[Prompt]
    words: Sequence[Words]
    decoding: Sequence[Decoding]
    completes: bool
    max_pixels: int


def plan_batches(exam: Exam, size: int) -> list[Batch]:
    """The questions in batches of about equal length and equally many pictures, whatever has been answered.

    The smallest comes first, where mistakes of the whole evaluation show soonest; then from the largest down,
    so that a lack of memory shows early too.
    """

    def weight(index: int) -> tuple[Any, ...]:
        prompt = exam.prompts[index]
        return _key(exam.decoding[index]), len(prompt.images), len(prompt.text), index

    order = sorted(range(len(exam.prompts)), key=weight)
    batches: list[Batch] = []
    for index in order:
        if batches and len(batches[-1]) < size and exam.decoding[batches[-1][0]] == exam.decoding[index]:
            batches[-1] = (*batches[-1], index)
        else:
            batches.append((index,))
    return batches[:1] + batches[:0:-1]


def _key(decoding: Decoding) -> tuple[Any, ...]:
    return tuple(vars(decoding).values())


def ask(
    model: AnsweringModel, exam: Exam, batches: Sequence[tuple[int, Batch]]
) -> Iterator[list[tuple[int, Row]]]:
    """The rows of each batch, with the numbers of their questions. A question that cannot be asked, as its
    picture is unreadable or it is too long, is answered "" and says why under "problem".

    Args:
        batches: with their numbers in the plan.
    Raises:
        InputError: not one question of the first batch of the plan can be asked.
    """
    for number, batch, pictures in _read_ahead(exam, batches):
        problems: dict[int, str] = {}
        shown: dict[int, list[bytes]] = {}
        for index, found in zip(batch, pictures, strict=True):
            if isinstance(found, ImageError):
                problems[index] = str(found)
            else:
                shown[index] = found
        answers: dict[int, str] = {}
        first: InputError | None = None
        for index, answer in zip(shown, _answers(model, exam, shown), strict=True):
            if isinstance(answer, InputError):
                first, problems[index] = first or answer, str(answer)
            else:
                answers[index] = answer
        if number == 0 and first is not None and not answers:
            raise first
        yield [(index, _row(exam, index, answers.get(index, ""), problems.get(index))) for index in batch]


def _read_ahead(
    exam: Exam, batches: Sequence[tuple[int, Batch]]
) -> Iterator[tuple[int, Batch, list[list[bytes] | ImageError]]]:
    """Batches with the pictures of each question; those of the next ones are read in the meantime."""

    def read(index: int) -> list[bytes] | ImageError:
        try:
            return [read_picture(source, exam.max_pixels) for source in exam.prompts[index].images]
        except ImageError as error:
            return error

    pool = ThreadPoolExecutor(_READERS)
    waiting: deque[tuple[int, Batch, list[Future[list[bytes] | ImageError]]]] = deque()
    try:
        for number, batch in [*batches, *[(-1, ())] * _AHEAD]:
            waiting.append((number, batch, [pool.submit(read, index) for index in batch]))
            if len(waiting) > _AHEAD:
                ready, indices, futures = waiting.popleft()
                if indices:
                    yield ready, indices, [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _answers(model: AnsweringModel, exam: Exam, shown: dict[int, list[bytes]]) -> list[str | InputError]:
    """The answers to the questions of a batch. Where it is refused as a whole, each question is asked alone,
    so that only those that are at fault stay without an answer."""
    if not shown:
        return []
    decoding = exam.decoding[next(iter(shown))]
    texts, pictures = [exam.prompts[index].text for index in shown], list(shown.values())
    try:
        if exam.completes:
            return [*model.complete(texts, pictures, decoding=decoding)]
        return [*model.generate([[Turn("user", text)] for text in texts], pictures, decoding=decoding)]
    except InputError as error:
        if len(shown) == 1:
            return [error]
    return [answer for index in shown for answer in _answers(model, exam, {index: shown[index]})]


def _row(exam: Exam, index: int, text: str, problem: str | None) -> Row:
    item, prediction = exam.items[index], text.strip()
    row: Row = {"id": item.id, "prediction": prediction}
    if exam.completes:
        row["prediction"] = cut_answer(text, exam.words[index])
        row["completion"] = text
    if item.question:
        row["question"] = item.question
    return row if problem is None else row | {"problem": problem}
