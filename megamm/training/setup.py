"""From a recipe to everything a run needs on this rank: groups, tokenizer, model, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megamm.config import Recipe
from megamm.data.tokenizer import Tokenizer
from megamm.device import (
    choose_backend,
    distributed_backend,
    pick_device,
    require_determinism,
    require_fp8,
    seed_everything,
)
from megamm.engine import groups
from megamm.engine.checkpoint import Checkpoints, Progress
from megamm.engine.groups import Groups
from megamm.engine.manifest import list_checkpoints
from megamm.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megamm.engine.parameter_groups import describe_rates
from megamm.engine.weights import initialize
from megamm.errors import InputError
from megamm.models.initialization import weight_drawer
from megamm.models.vlm import build_model
from megamm.recipe import validate_world
from megamm.training.handover import hand_over, start_of
from megamm.training.preflight import preflight
from megamm.training.run_lock import RunLock

Report = Callable[[str], None]


@dataclass
class Session:
    """One rank's part of a training run.

    Attributes:
        models: chunks of the model that this rank holds.
        wrapped: the same with gradient buffers and data-parallel reduction.
        optimizer, schedule: megatron-core's.
        checkpoints: the run's, to be saved and loaded.
        progress: where training stands (resumed or 0 at first).
        backend_reason: which layers were chosen and why, for the log.
        lock: that no other run uses its directory.
    """

    recipe: Recipe
    groups: Groups
    tokenizer: Tokenizer
    models: list[torch.nn.Module]
    wrapped: list[Any]
    optimizer: Any
    schedule: Any
    checkpoints: Checkpoints
    progress: Progress
    backend_reason: str
    lock: RunLock


def load_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, checked against the size of the vocabulary.

    Raises:
        InputError: it has more tokens than the model has embeddings.
    """
    tokenizer = Tokenizer.load(recipe.tokenizer)
    vocab_size = recipe.model.language.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.language.vocab_size: {vocab_size}, but the tokenizer {recipe.tokenizer} has "
            f"{tokenizer.vocab_size} tokens; set it to at least {tokenizer.vocab_size}"
        )
    image_id = recipe.model.image_token_id
    if image_id is not None and image_id != tokenizer.image_id:
        raise InputError(
            f"model.image_token_id: {image_id}, but in the tokenizer {recipe.tokenizer} `<image>` is "
            f"{tokenizer.image_id}; use the tokenizer of this model"
        )
    return tokenizer


def build_session(
    recipe: Recipe, report: Report, joined: Callable[[Groups], object] = lambda _: None
) -> Session:
    """Join the other ranks, build the model in the recipe's layout, give it its weights (random, from
    `training.init_from`, or from the run's newest checkpoint).

    Args:
        recipe: validated.
        report: takes lines for the log.
        joined: is called as soon as the ranks have found each other.
    """
    validate_world(recipe, groups.world_size())
    if recipe.training.deterministic:
        require_determinism()
    device = pick_device(recipe.training.device)
    tokenizer = load_tokenizer(recipe)
    _look_for_start(recipe)
    backend_name, reason = choose_backend(recipe.parallel.backend)
    require_fp8(recipe.training.fp8.scaling, backend_name, device)
    seed_everything(recipe.seed)
    layout = groups.initialize(recipe.parallel, device, distributed_backend(device))
    joined(layout)
    lock = RunLock(Path(recipe.run_dir), report)
    preflight(recipe, layout, tokenizer, report)
    models = build_model(recipe, layout, backend_name, tokenizer.image_id)
    initialize(models, weight_drawer(recipe.model, recipe.seed))
    wrapped = wrap_data_parallel(models, recipe, layout)
    optimizer = build_optimizer(wrapped, recipe, layout)
    directory = Path(recipe.run_dir) / "checkpoints"
    session = Session(
        recipe=recipe,
        groups=layout,
        tokenizer=tokenizer,
        models=models,
        wrapped=wrapped,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, recipe.optimizer, recipe.training.steps),
        checkpoints=Checkpoints(directory, models, optimizer, recipe, tokenizer.save, layout, report),
        progress=Progress(),
        backend_reason=f"{backend_name} ({reason})",
        lock=lock,
    )
    _load_weights(session, report)
    for line in describe_rates(recipe):
        report(line)
    return session


def _look_for_start(recipe: Recipe) -> None:
    """Whether the weights that a new run begins with are there at all, before a large model is built.

    Raises:
        InputError: they are not.
    """
    begins = not list_checkpoints(Path(recipe.run_dir) / "checkpoints")
    if recipe.training.init_from and begins:
        start_of(recipe)


def _load_weights(session: Session, report: Report) -> None:
    recipe = session.recipe
    resumed = None
    if not recipe.resume.enabled:
        _refuse_old_checkpoints(session.checkpoints.directory)
    else:
        resumed = session.checkpoints.load_newest()
    if resumed is not None:
        session.progress = resumed
        session.schedule.step(resumed.step)
        report(f"resumed at step {resumed.step} ({resumed.consumed_samples:,} samples seen)")
    elif recipe.training.init_from:
        hand_over(recipe, session.models, session.optimizer, session.tokenizer, session.groups, report)


def _refuse_old_checkpoints(directory: Path) -> None:
    """A new run among the checkpoints of another would have its own taken for the older ones and deleted."""
    found = list_checkpoints(directory)
    if found:
        raise InputError(
            f"{directory}: has checkpoints of an earlier run, and resume.enabled is false; give another "
            "run_dir, move them away, or let the run go on from them"
        )
