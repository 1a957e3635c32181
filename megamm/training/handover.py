"""How a stage begins with what another has trained (`training.init_from`).

First a plan, from the checkpoint's recipe and tensors and this recipe's model: which weights are taken as
they are, which are made anew from those (a grown vocabulary, adapters added to their linears, positions of
another image size), and which parts start afresh. What does not fit is refused as one list, before anything
is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megamm.config import EMBEDDING, OUTPUT, POSITIONS, Recipe, compared_values, part_of
from megamm.data.tokenizer import Tokenizer
from megamm.engine import handover
from megamm.engine.checkpoint import resolve, tokenizer_directory
from megamm.engine.groups import Groups
from megamm.engine.handover import Make, Shape, Stage, Wanted
from megamm.errors import InputError
from megamm.layers.lora import merged
from megamm.models.initialization import mean_row
from megamm.models.vision.positions import resize_positions
from megamm.recipe_checks import trainable_parts

_MOST = 10  # differences that are listed
# Settings that change no tensor and that a stage may well change; anything else would make the weights mean
# something else.
_MAY_CHANGE = {
    "model.language.max_positions",
    "model.language.rope_theta",
    "model.language.sliding_window",
    "model.cross_attention.skip_text_only",
}
_FEATURES = {"model.vision.feature_layer", "model.vision.feature_select", "model.vision.feature_norm"}


@dataclass(frozen=True)
class Difference:
    """Something in which the checkpoint and this run's model do not fit together."""

    key: str
    there: str
    here: str

    def __str__(self) -> str:
        return f"{self.key}: there {self.there}, here {self.here}"


@dataclass(frozen=True)
class Plan:
    """What is taken.

    Attributes:
        as_they_are: names of weights.
        made: name -> what makes the tensor.
        fresh: parts that the checkpoint does not have.
        lines: for the log, one for each kind of thing that happens.
    """

    as_they_are: frozenset[str]
    made: dict[str, Make]
    fresh: list[str]
    lines: list[str]


def start_of(recipe: Recipe) -> Path:
    """The checkpoint that `training.init_from` names.

    Raises:
        InputError: there is none.
    """
    assert recipe.training.init_from is not None
    try:
        return resolve(recipe.training.init_from)
    except InputError as error:
        raise InputError(
            f"training.init_from: {error}; the stage that writes it comes before this one"
        ) from None


def hand_over(
    recipe: Recipe,
    models: list[Any],
    optimizer: Any,
    tokenizer: Tokenizer,
    groups: Groups,
    report: Callable[[str], None],
) -> None:
    """Begin with the weights (and, if the recipe wants it, the optimizer's state) that `training.init_from`
    names (collective).

    Raises:
        InputError: the checkpoint is damaged, or does not fit; with everything that does not.
    """
    stage = handover.open_stage(start_of(recipe))
    words = tokenizer_directory(stage.path)
    old_tokenizer = Tokenizer.load(words) if words.is_dir() else None
    plan = plan_handover(stage, recipe, handover.wanted_by(models, groups), old_tokenizer, tokenizer)
    carry_out(plan, stage, recipe, models, optimizer, groups)
    for line in plan.lines:
        report(line)


def carry_out(
    plan: Plan, stage: Stage, recipe: Recipe, models: list[Any], optimizer: Any, groups: Groups
) -> None:
    """Load what the plan says (collective)."""
    handover.take_weights(stage, models, groups, plan.as_they_are, plan.made)
    optimizer.reload_model_params()  # its fp32 copies were made from the random weights
    if recipe.training.init_optimizer == "keep":
        handover.take_optimizer(stage, models, optimizer, groups)


def plan_handover(
    stage: Stage,
    recipe: Recipe,
    wanted: Wanted,
    old_tokenizer: Tokenizer | None = None,
    tokenizer: Tokenizer | None = None,
) -> Plan:
    """Decide what is taken; loads nothing.

    Args:
        old_tokenizer, tokenizer: of the checkpoint and of this run; None if there is none to compare.
    Raises:
        InputError: lists what does not fit.
    """
    shared, fresh = _shared_parts(stage, wanted)
    differences = [
        *_lost_parts(stage, recipe, wanted),
        *_settings(stage, recipe, shared),
        *_tokens(stage, recipe, old_tokenizer, tokenizer),
    ] or list(_tensors(stage, wanted, shared))
    if differences:
        remedy = "correct the model section or tokenizer, or name another checkpoint in training.init_from"
        raise InputError(_listed(f"{stage.path}: does not fit this recipe; {remedy}", differences))
    made = dict(_made(stage, recipe, shared))
    if recipe.training.init_optimizer == "keep":
        without = list(_without_moments(stage, recipe, wanted, made))
        if without:
            remedy = "set training.init_optimizer to reset, or train what was trained there"
            raise InputError(_listed(f"{stage.path}: its optimizer state does not fit; {remedy}", without))
    taken = frozenset(name for name in wanted.shapes if part_of(name) in shared) - made.keys()
    return Plan(taken, made, fresh, list(_lines(stage, recipe, wanted, shared, fresh)))


def _listed(sentence: str, differences: list[Difference]) -> str:
    shown = [f"  {difference}" for difference in differences[:_MOST]]
    more = len(differences) - _MOST
    return "\n".join([f"{sentence}:", *shown, *([f"  and {more} more"] if more > 0 else [])])


def _shared_parts(stage: Stage, wanted: Wanted) -> tuple[set[str], list[str]]:
    """The parts that both have, and those that are new."""
    there = {part_of(name) for name in stage.weights}
    here = {part_of(name) for name in wanted.shapes}
    return there & here, sorted(here - there)


def _merges_adapters(stage: Stage, recipe: Recipe) -> bool:
    return not recipe.model.lora.rank and any(part_of(name) == "lora" for name in stage.weights)


# --- what does not fit --------------------------------------------------------------------------------


def _lost_parts(stage: Stage, recipe: Recipe, wanted: Wanted) -> Iterator[Difference]:
    here = {part_of(name) for name in wanted.shapes} | {"lora"}  # adapters are added to what they adapt
    for part in sorted({part_of(name) for name in stage.weights} - here):
        count = sum(part_of(name) == part for name in stage.weights)
        yield Difference(part, f"{count} weights, which would be lost", "no such part")


def _settings(stage: Stage, recipe: Recipe, shared: set[str]) -> Iterator[Difference]:
    """Settings of shared parts that make them other parts."""
    there, here = compared_values(stage.recipe.model), compared_values(recipe.model)
    handled = _MAY_CHANGE | {"model.vision.image_size", "model.language.vocab_size"}
    if "connector" not in shared:  # a new one learns from whichever features it is given
        handled |= _FEATURES
    for key, value in here.items():
        if key == "model.connector.kind" and "connector" in shared and there[key] != value:
            yield Difference(key, there[key], value)
            shared = shared - {"connector"}  # its other settings follow from that
        is_shared = key.split(".")[1] in shared and key not in handled
        if is_shared and there[key] != value:
            yield Difference(key, str(there[key]), str(value))
    size, old_size = recipe.model.language.vocab_size, stage.recipe.model.language.vocab_size
    if "language" in shared and size < old_size:
        yield Difference("model.language.vocab_size", str(old_size), f"{size}, so that tokens would be lost")


def _tokens(
    stage: Stage, recipe: Recipe, old: Tokenizer | None, new: Tokenizer | None
) -> Iterator[Difference]:
    """Ids that stand for another token: their embeddings would mean another word."""
    if old is None or new is None or old.sha256 == new.sha256:
        return
    before, after = old.tokens(), new.tokens()
    size = stage.recipe.model.language.vocab_size
    for token in sorted(before.keys() & after.keys()):
        if token < size and before[token] != after[token]:
            yield Difference(f"token {token}", repr(before[token]), repr(after[token]))


def _tensors(stage: Stage, wanted: Wanted, shared: set[str]) -> Iterator[Difference]:
    """Tensors of shared parts that only one of them has, or in another shape."""
    names = {name for name in stage.weights.keys() | wanted.shapes.keys() if part_of(name) in shared}
    for name in sorted(names):
        there, here = stage.weights.get(name), wanted.shapes.get(name)
        if there is None or here is None:
            yield Difference(
                name, *("none" if shape is None else str(list(shape)) for shape in (there, here))
            )
        elif not _fits(name, there, here):
            yield Difference(name, str(list(there)), str(list(here)))


def _fits(name: str, there: Shape, here: Shape) -> bool:
    if name in (EMBEDDING, OUTPUT, POSITIONS):  # the rows are made to fit
        return there[1:] == here[1:]
    return there == here


def _without_moments(
    stage: Stage, recipe: Recipe, wanted: Wanted, made: dict[str, Make]
) -> Iterator[Difference]:
    """Reasons why the optimizer's state cannot be taken over."""
    there, here = stage.recipe, recipe
    if not stage.manifest.has_optimizer:
        yield Difference("optimizer state", "none", "kept")
        return
    for key, old, new in (
        ("training.precision", there.training.precision, here.training.precision),
        (
            "parallel.distributed_optimizer",
            there.parallel.distributed_optimizer,
            here.parallel.distributed_optimizer,
        ),
    ):
        if old != new:
            yield Difference(key, str(old), str(new))
    for name in sorted(wanted.trained):
        if name in made:
            yield Difference(name, "state of another tensor", "trained")
        elif name not in stage.moments:
            yield Difference(name, "not trained", "trained")
        elif name in wanted.by_rows and not _trained_same_rows(stage, recipe, name):
            yield Difference(name, "state of other rows", "only new tokens trained")


def _trained_same_rows(stage: Stage, recipe: Recipe, name: str) -> bool:
    unfreeze = stage.recipe.training.unfreeze
    added = stage.recipe.model.language.added_vocab == recipe.model.language.added_vocab
    was_whole = name == OUTPUT and unfreeze.language is not None  # it goes with the last blocks
    return added and unfreeze.new_tokens and not was_whole


# --- what is made anew --------------------------------------------------------------------------------


def _made(stage: Stage, recipe: Recipe, shared: set[str]) -> Iterator[tuple[str, Make]]:
    weights = stage.read()
    there, here = stage.recipe.model, recipe.model
    if "language" in shared and here.language.vocab_size > there.language.vocab_size:
        sizes = (there.language.vocab_size, here.language.vocab_size)
        for name in {EMBEDDING, OUTPUT} & stage.weights.keys():
            yield name, partial(_grown, weights, name, *sizes)
    if "vision" in shared and here.vision.image_size != there.vision.image_size:
        yield POSITIONS, partial(_resized, weights)
    if _merges_adapters(stage, recipe):
        for name in _adapted(stage):
            yield name, partial(_merged, weights, name, stage)


def _grown(weights: Any, name: str, old_size: int, new_size: int, shape: Shape) -> torch.Tensor:
    old = weights[name][:old_size]  # without rows that padded it
    whole = old.new_zeros(shape)
    whole[:old_size] = old
    whole[old_size:new_size] = mean_row(old)
    return whole


def _resized(weights: Any, shape: Shape) -> torch.Tensor:
    return resize_positions(weights[POSITIONS], round((shape[0] - 1) ** 0.5))


def _merged(weights: Any, name: str, stage: Stage, shape: Shape) -> torch.Tensor:
    return merged(name, weights.__getitem__, stage.recipe.model)


def _adapted(stage: Stage) -> list[str]:
    """The weights that have adapters in the checkpoint."""
    return sorted({f"{n.split('.lora.')[0]}.weight" for n in stage.weights if part_of(n) == "lora"})


# --- what is told -------------------------------------------------------------------------------------


def _lines(stage: Stage, recipe: Recipe, wanted: Wanted, shared: set[str], fresh: list[str]) -> Iterator[str]:
    there, here = stage.recipe.model, recipe.model
    drawn = f"; {', '.join(fresh)} start from random weights" if fresh else ""
    yield f"weights from {stage.path}{drawn}"
    if "language" in shared and here.language.vocab_size > there.language.vocab_size:
        yield (
            f"vocabulary grown from {there.language.vocab_size} to {here.language.vocab_size} tokens; the "
            "new rows start as the mean of the others"
        )
    if _merges_adapters(stage, recipe):
        yield f"adapters (LoRA) added to the {len(_adapted(stage))} weights that they adapt"
    if "vision" in shared and here.vision.image_size != there.vision.image_size:
        yield (
            f"positions of the encoder interpolated from images of {there.vision.image_size} to "
            f"{here.vision.image_size} pixels"
        )
    old, new = compared_values(there), compared_values(here)
    for key in sorted(_MAY_CHANGE):
        if key.split(".")[1] in shared and old[key] != new[key]:
            yield f"{key} was {old[key]}, is {new[key]}"
    if stage.manifest.has_optimizer:
        yield f"trained there: {_trained(stage.recipe)}; trained here: {_trained(recipe)}"
    if recipe.training.init_optimizer == "keep":
        dropped = len(stage.moments - wanted.trained)
        left = f"; that of {dropped} weights, which are not trained any more, was left out" if dropped else ""
        yield f"optimizer state of {len(wanted.trained)} weights kept{left}"


def _trained(recipe: Recipe) -> str:
    if recipe.model.assembly == "language":
        return "language"
    names = []
    for part in trainable_parts(recipe):
        first = getattr(recipe.training.unfreeze, part, None)
        names.append(part if first is None else f"{part} from block {first}")
    if recipe.training.unfreeze.new_tokens:
        names = [f"{name} (new tokens)" if name.startswith("language") else name for name in names]
    return ", ".join(names)
