"""The benchmarks: how each is read, which metric scores it, and in which format its server takes answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megamm.errors import InputError
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.readers import gqa, mmbench, mme, mmmu, pope, scienceqa, textvqa, vizwiz, vqa
from megamm.evaluation.tasks.readers.captions import Captions

# (data, images, split) -> items; see readers/__init__.py
Reader = Callable[[Sequence[Path], Path | None, str], Iterator[Item]]


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: as `--task` takes it.
        metric: as `megamm score --metric` takes it.
        read: the reader.
        submission: name of the format in submission.py; "" where no server takes answers.
        has_shots: whether few-shot demonstrations are made of its training split.
    """

    name: str
    metric: str
    read: Reader
    submission: str = ""
    has_shots: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("coco_caption", "caption", Captions("coco_caption"), "captions", has_shots=True),
        Task("flickr30k", "caption", Captions("flickr30k"), "captions", has_shots=True),
        Task("nocaps", "caption", Captions("nocaps"), "captions", has_shots=True),
        Task("vqav2", "vqa", vqa.read, "answers", has_shots=True),
        Task("okvqa", "vqa", vqa.read, "answers", has_shots=True),
        Task("textvqa", "vqa", textvqa.read, "answers", has_shots=True),
        Task("vizwiz", "vqa", vizwiz.read, "answers", has_shots=True),
        Task("gqa", "gqa", gqa.read, "gqa", has_shots=True),
        Task("pope", "pope", pope.read),
        Task("mme", "mme", mme.read, "mme"),
        Task("mmbench", "mmbench", mmbench.read, "mmbench"),
        Task("scienceqa_img", "scienceqa", scienceqa.read),
        Task("mmmu", "mmmu", mmmu.read, "mmmu"),
    )
}


def read_items(task: Task, data: Sequence[Path], images: Path | None, limit: int | None) -> list[Item]:
    """The questions of a benchmark, in the order of its files.

    Args:
        limit: of questions, from the first on.
    Raises:
        InputError: the data are wrong, hold no question, or the same id twice.
    """
    items: list[Item] = []
    seen: set[str] = set()
    for item in task.read(data, images, "test"):
        if item.id in seen:
            raise InputError(
                f"{data[0]}: the question {item.id!r} stands twice; give every question its own id"
            )
        seen.add(item.id)
        items.append(item)
        if len(items) == limit:
            break
    if not items:
        raise InputError(f"{data[0]}: holds no questions; give the data of {task.name}")
    return items
