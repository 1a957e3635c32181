"""Questions with known answers, read from conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamm.data.formats import make_format
from megamm.data.json_entries import iter_entries
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError


@dataclass(frozen=True)
class Question:
    """One question, asked after the true answers of the questions before it.

    Attributes:
        id: that of the entry; of an entry with several questions, followed by #1, #2, ...
        turns: the conversation up to and including the question.
        images: files, in the order of their placeholders in `turns`.
        answer: what the data set says.
        kind: of question, where the entry names one.
    """

    id: str
    turns: list[Turn]
    images: list[Path]
    answer: str
    kind: str | None

    @property
    def text(self) -> str:
        """The question as it is written in the data set."""
        return self.turns[-1].text


def read_questions(data: list[Path], images: Path | None) -> list[Question]:
    """All questions of LLaVA JSON files.

    Args:
        data: files; their entries may carry a "kind" beside LLaVA's keys.
        images: folder below which the pictures lie; None means that of the file that names them.
    Raises:
        InputError: wrong data, missing pictures, or the same id twice.
    """
    questions = [question for path in data for question in iter_questions(path, images or path.parent)]
    missing = sorted({str(p) for q in questions for p in q.images if not p.is_file()})
    if missing:
        raise InputError(
            f"{missing[0]}: no such picture (and {len(missing) - 1} more are missing); "
            f"give the folder of the pictures with --images"
        )
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"{data[-1]}: the id {question.id!r} stands twice; give every entry its own")
        seen.add(question.id)
    return questions


def iter_questions(path: Path, root: Path) -> Iterator[Question]:
    """The questions of one LLaVA JSON file, in its order; no more of it is read than is asked for.

    Args:
        root: folder below which the pictures lie.
    Raises:
        InputError: wrong data. Pictures are not looked at.
    """
    for conversation, entry in zip(
        make_format("llava").conversations([path]), iter_entries(path), strict=True
    ):
        kind = entry.get("kind")
        if kind is not None and not isinstance(kind, str):
            raise InputError(f'{path}: entry {conversation.key!r}: "kind" is {kind!r}; give it as text')
        turns, pairs = conversation.turns, len(conversation.turns) // 2
        for number in range(pairs):
            asked = turns[: 2 * number + 1]
            num_images = sum(turn.text.count(IMAGE_TOKEN) for turn in asked)
            name = conversation.key if pairs == 1 else f"{conversation.key}#{number + 1}"
            shown = [root / str(image) for image in conversation.images[:num_images]]
            yield Question(name, asked, shown, turns[2 * number + 1].text, kind)
