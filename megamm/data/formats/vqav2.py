"""VQAv2 and OK-VQA: questions and annotations in separate files.

{"questions": [{"question_id", "image_id", "question"}]} and {"annotations": [{"question_id",
"multiple_choice_answer", "answers": [{"answer"} x 10], ...}]}, as visualqa.org and okvqa.allenai.org
distribute them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.base import Chunk, Format
from megamm.data.formats.fields import Fields, most_frequent
from megamm.data.formats.lookup import joined_chunks, lookup
from megamm.data.formats.records import answered, coco_names
from megamm.data.json_entries import find_key, iter_entries
from megamm.errors import InputError


class Vqav2(Format):
    """Both files are sources, in any order, also of several splits at once; they are told apart by what
    they hold and joined by "question_id".

    The answer to learn is "multiple_choice_answer", where there is none the most frequent of "answers".
    Questions without an annotation are left out.
    """

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        kinds = [find_key(path, ("questions", "annotations")) for path in sources]
        for path, kind in zip(sources, kinds, strict=True):
            if kind is None:
                raise InputError(f'{path}: has neither "questions" nor "annotations"; give files of VQAv2')
        for missing, other in (("questions", "annotations"), ("annotations", "questions")):
            if missing not in kinds:
                raise InputError(f"{sources[0]}: holds {other} alone; give the file with the {missing} too")
        with lookup() as answers:
            for path, kind in zip(sources, kinds, strict=True):
                if kind == "annotations":
                    answers.put(_answers(path))
            for number, (path, kind) in enumerate(zip(sources, kinds, strict=True)):
                if kind == "questions":
                    yield from joined_chunks(path, number, "questions", "question_id", answers)

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        first, pairs = chunk.payload
        for position, (question, answer) in enumerate(pairs, start=first):
            entry = Fields(question, f"{chunk.source}: entry {position + 1}")
            key = entry.identifier("question_id")
            if answer is None:
                yield Skipped(key, position, "has no annotation")
            else:
                image = coco_names(entry.number("image_id"))
                yield answered(key, position, image, entry.text("question"), answer)


def _answers(path: Path) -> Iterator[tuple[str, str]]:
    for position, value in enumerate(iter_entries(path, "annotations")):
        entry = Fields(value, f"{path}: entry {position + 1}")
        answer = entry.text_or_none("multiple_choice_answer")
        if not answer:
            given = [Fields(each, entry.where).text_or_none("answer") for each in entry.listed("answers")]
            answer = most_frequent(given)
        yield entry.identifier("question_id"), answer
