"""Panels: pictures, question, true answer and what the model says now, in RUN_DIR/samples/step-N/."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from megamm.config import Recipe
from megamm.data.image_header import open_image
from megamm.data.images import ImageLoader
from megamm.data.images_pillow import to_rgb
from megamm.data.questions import Question, iter_questions
from megamm.engine.groups import Groups
from megamm.engine.ranks import describe, from_rank_0, gather_on_rank_0
from megamm.errors import InputError
from megamm.inference.asking import Asking, evaluation_loader, load_pictures
from megamm.inference.layout import LayoutModel
from megamm.whole_files import read_whole

MAX_SIDE = 256  # pixels of the copies of pictures


@dataclass(frozen=True)
class Asked:
    """A question that can be asked: prompt ids and [n, 3, H, W] pixels."""

    question: str
    answer: str
    prompt: list[int]
    pixels: torch.Tensor


class Panels:
    """The first validation.num_questions questions of validation.questions, read and checked once, by rank 0.

    Attributes:
        description: lines for the log: what is asked, and what is left out and why.
    """

    def __init__(self, recipe: Recipe, groups: Groups, model: LayoutModel, start_step: int) -> None:
        """
        Args:
            start_step: steps already done. Panels of later steps, left by an interrupted run that went
                further than its last checkpoint, are removed, like the rows of its metrics.
        Raises:
            InputError: the file is missing or is not in LLaVA's format; on every rank.
        """
        self._model, self._groups, self._max_new_tokens = model, groups, recipe.validation.max_new_tokens
        self.directory = Path(recipe.run_dir) / "samples"
        self._copies: list[dict[str, bytes]] = []  # of each question, on rank 0

        def read() -> tuple[list[Asked], list[str]]:
            asked, self._copies, left_out = read_questions(recipe, model.asking)
            remove_panels_after(self.directory, start_step)
            return asked, left_out

        self._asked, left_out = from_rank_0(read)
        self.description = [
            f"validation: {len(self._asked)} questions of {recipe.validation.questions} are answered into "
            f"{self.directory}",
            *(f"warning: validation.questions: left out: {reason}" for reason in left_out),
        ]

    def path(self, step: int) -> Path:
        """Where the panels of a step lie."""
        return self.directory / f"step-{step:08d}"

    def exists(self, step: int) -> bool:
        """Whether a step has its panels, or there are none to make."""
        return not self._asked or (self.path(step) / "samples.json").exists()

    def make(self, step: int) -> str | None:
        """Answer the questions, and write the panels on rank 0 (collective); why that failed, if it did."""
        answers = self._answers()
        if not answers:
            return None
        rows: list[dict[str, Any]] = [
            {"question": a.question, "answer": a.answer, "prediction": answers[n], "images": list(copies)}
            for n, (a, copies) in enumerate(zip(self._asked, self._copies, strict=True))
        ]
        files = {name: data for copies in self._copies for name, data in copies.items()}
        files["samples.json"] = json.dumps(rows, indent=2, ensure_ascii=False).encode()
        try:
            write_folder(self.path(step), files)
        except OSError as error:
            return f"{self.path(step)}: cannot be written ({describe(error)}); training goes on"
        return None

    def _answers(self) -> dict[int, str] | None:
        """On rank 0, the answers by number of the question; copies of the model share the questions."""
        mine = list(enumerate(self._asked))[self._groups.dp_rank :: self._groups.dp_size]
        found = self._model.generate(
            [asked.prompt for _, asked in mine], [asked.pixels for _, asked in mine], self._max_new_tokens
        )
        everywhere = gather_on_rank_0({n: text for (n, _), text in zip(mine, found, strict=True)})
        if everywhere is None:
            return None
        return {n: text for answers in everywhere for n, text in answers.items()}


def read_questions(recipe: Recipe, asking: Asking) -> tuple[list[Asked], list[dict[str, bytes]], list[str]]:
    """(questions, the copies of their pictures by file name, why others were left out)."""
    validation = recipe.validation
    assert validation.questions is not None
    path = Path(validation.questions)
    if not path.is_file():
        raise InputError(f"validation.questions: {path} is not a file; give one in LLaVA's JSON format")
    root = Path(validation.images) if validation.images else path.parent
    asked: list[Asked] = []
    copies: list[dict[str, bytes]] = []
    left_out: list[str] = []
    loader = evaluation_loader(recipe)
    for question in islice(iter_questions(path, root), validation.num_questions):
        try:
            found = _asked(question, recipe, asking, loader)
            pictures = _copies(question, len(asked) + 1, recipe.data.image.max_pixels)
        except InputError as error:
            left_out.append(f"question {question.id!r}: {error}")
            continue
        asked.append(found)
        copies.append(pictures)
    loader.close()
    return asked, copies, left_out


def _asked(question: Question, recipe: Recipe, asking: Asking, loader: ImageLoader) -> Asked:
    limit = recipe.data.max_images
    if recipe.model.assembly == "cross_attention" and len(question.images) > limit:
        raise InputError(f"{len(question.images)} pictures, more than data.max_images {limit}")
    prompt = asking.prompt(question.turns)
    asking.check_length(len(prompt), recipe.validation.max_new_tokens, "validation.max_new_tokens")
    return Asked(question.text, question.answer, prompt, load_pictures(question.images, loader))


def _copies(question: Question, number: int, max_pixels: int) -> dict[str, bytes]:
    """Small copies of the pictures, which the loader could read."""
    found = {}
    for place, path in enumerate(question.images, start=1):
        with open_image(read_whole(path), max_pixels) as image:
            small = to_rgb(image)
        small.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=85)
        found[f"{number}-{place}.jpg"] = stream.getvalue()
    return found


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """A folder of `files` in place of what was there; never half of it."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, data in files.items():
        (new / name).write_bytes(data)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)


def remove_panels_after(directory: Path, step: int) -> None:
    """Remove the panels of steps after `step`, and what a kill left unfinished."""
    if dist.get_rank() != 0 or not directory.is_dir():
        return
    for path in directory.iterdir():
        name = re.fullmatch(r"(\.?)step-(\d{8,})(\.new)?", path.name)
        if name and (name[1] or int(name[2]) > step):
            shutil.rmtree(path)
