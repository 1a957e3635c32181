"""What a user may choose of an evaluation, and whether the choices fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamm.config import Recipe
from megamm.data.templates import Template
from megamm.errors import InputError
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.prompts import Prompts, choose_prompts
from megamm.evaluation.tasks.registry import Task
from megamm.inference import Decoding


@dataclass(frozen=True)
class TaskSettings:
    """How a benchmark is asked.

    Attributes:
        images: folder of the pictures; None: where the data are.
        batch_size: questions asked at once by a copy of the model.
        limit: of questions, from the first on; None: all.
        prompts: name of a set of words; None: that of the recipe's template.
        shots: demonstrations before each question; None: the set of words is asked without.
        demonstrations: files of the training split, for sets with demonstrations.
        seed: of the first run; draws demonstrations and samples.
        runs: evaluations, each with the next seed; None: one, whose files have no number.
        submission: where the file for the official server goes; None: nowhere.
        decoding: settings of decoding that replace those of the set of words.
        tensor, pipeline: layout of each copy of the model.
        vqa_rule: as of `megamm score`.
    """

    images: Path | None = None
    batch_size: int = 32
    limit: int | None = None
    prompts: str | None = None
    shots: int | None = None
    demonstrations: Sequence[Path] = ()
    seed: int = 0
    runs: int | None = None
    submission: Path | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    tensor: int = 1
    pipeline: int = 1
    vqa_rule: str = "always"


def fitting_prompts(recipe: Recipe, task: Task, settings: TaskSettings) -> Prompts:
    """The set of words, after a check that it, the demonstrations and the model go together.

    Raises:
        InputError: they do not.
    """
    wants_shots = settings.shots is not None or bool(settings.demonstrations)
    prompts = choose_prompts(settings.prompts, recipe.template, wants_shots)
    if prompts.shots is None:
        if wants_shots:
            given = "--shots" if settings.shots is not None else "--demonstrations"
            raise InputError(
                f"{given}: the prompts {prompts.name} have no demonstrations; leave it out, or give "
                "--prompts open_flamingo"
            )
        return prompts
    if recipe.model.assembly != "cross_attention":
        raise InputError(
            f"--prompts: {prompts.name} is for models with gated cross-attention, and "
            "model.assembly of the recipe "
            f"is {recipe.model.assembly}; choose other prompts and leave out --shots"
        )
    if not task.has_shots:
        raise InputError(
            f"--shots: {task.name} has no training split to take demonstrations from; choose other prompts"
        )
    _check_demonstrations(prompts, task, settings)
    return prompts


def _check_demonstrations(prompts: Prompts, task: Task, settings: TaskSettings) -> None:
    blind = prompts.shots.blind if prompts.shots is not None else 0
    if not settings.demonstrations:
        raise InputError(
            f"--demonstrations: the prompts {prompts.name} need the training split of {task.name}, with 0 "
            f"shots too (they begin with {blind} demonstrations without pictures); give its file"
        )
    for path in settings.demonstrations:
        if path.is_dir():  # it may hold the split that is evaluated
            raise InputError(
                f"{path}: is a folder; give the files of the training split with --demonstrations"
            )


def check_template(recipe: Recipe, prompts: Prompts, task: Task, items: Sequence[Item]) -> None:
    """Raise InputError if the recipe's template has no place for the questions of the benchmark."""
    if prompts.shots is not None:
        return
    takes = Template.by_name(recipe.template).takes
    if takes == "document" or (takes == "pair" and any(item.kind != "caption" for item in items)):
        able = "captions alone" if takes == "pair" else "no questions"
        raise InputError(
            f"template: the recipe's {recipe.template} takes {able}, so --task {task.name} cannot "
            "be asked; use a "
            "checkpoint of a later stage, or override the template (--template=vicuna)"
        )


def decoding_of(prompts: Prompts, kind: str, task: Task, settings: TaskSettings, run: int) -> Decoding:
    """How answers to one kind of question are decoded: greedy search, changed by the set of words, its kind,
    and the user, in this order.

    Raises:
        InputError: a value is out of its range.
    """
    words = prompts.of(kind, task.name)
    defaults = {**prompts.decoding, **words.decoding}
    return Decoding.chosen(defaults, settings.decoding, settings.seed + run)
