"""`megamm parity`: one process, then each layout, and what differs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from megamm.config import Recipe, RecomputeConfig
from megamm.device import num_gpus
from megamm.errors import InputError, RunError
from megamm.parity.compare import Comparison, Run, compare
from megamm.parity.layouts import ONE_PROCESS, Layout
from megamm.parity.processes import RankFailure, run_processes
from megamm.parity.shrink import changes, comparable, shrunk
from megamm.recipe import recipe_to_yaml, validate, validate_world

Device = Literal["cpu", "cuda"]
WORKER = "megamm.parity.worker:run"


@dataclass(frozen=True)
class Plan:
    """What is going to run.

    Attributes:
        recipe: comparable, and shrunk unless it was to stay as it is; in the layout of one process.
        layouts: to be compared with it.
        changes: "key old -> new" of everything that is not as in the recipe.
        device: "cpu" or "cuda".
        notes: what the user should know.
    """

    recipe: Recipe
    layouts: list[Layout]
    changes: list[str]
    device: Device
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """How a layout did: a comparison, or why there is none."""

    layout: Layout
    comparison: Comparison | None
    failure: str = ""

    def passed(self, tolerance: float) -> bool:
        """Whether all differences of results are within `tolerance`."""
        return self.comparison is not None and self.comparison.largest <= tolerance


def make_plan(recipe: Recipe, layouts: list[Layout], full_size: bool) -> Plan:
    """Check that every layout can run, before anything is started.

    Raises:
        InputError: a layout that the (shrunk) recipe cannot have, or that this machine cannot run; or this
            is one of several processes already.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("parity starts its processes itself; call it without torchrun or srun")
    small = comparable(recipe if full_size else shrunk(recipe, layouts), layouts)
    device = _device(recipe, layouts)
    small = replace(small, training=replace(small.training, device=device))
    for layout in layouts:
        _check(layout, small)
    unfit = [note for layout in layouts if not full_size and (note := _why_unfit(layout, recipe))]
    single = ONE_PROCESS.applied_to(small)
    changed = [text for text in changes(ONE_PROCESS.applied_to(recipe), single) if ".preset " not in text]
    return Plan(small, layouts, changed, device, unfit)


def run_reference(plan: Plan, timeout: float) -> Run:
    """The one process that the layouts are compared with.

    Args:
        timeout: seconds that it may take.
    Raises:
        RunError: it failed.
    """
    # it keeps all activations: computing them again is one of the things that are compared
    training = replace(plan.recipe.training, recompute=RecomputeConfig())
    try:
        (reference,) = _run_one(
            replace(plan.recipe, training=training), ONE_PROCESS, plan.device, timeout, WORKER
        )
    except RankFailure as error:
        raise RunError(f"the one process to compare with failed: {error}") from error
    return reference


def run_layout(
    plan: Plan, layout: Layout, reference: Run, tolerance: float, timeout: float, worker: str = WORKER
) -> Result:
    """Start the processes of a layout and compare what they did.

    Args:
        tolerance: for the relative differences.
        timeout: seconds that the layout may take.
        worker: "module:function" that each process calls.
    """
    try:
        ranks = _run_one(plan.recipe, layout, plan.device, timeout, worker)
    except RankFailure as error:
        return Result(layout, None, str(error))
    return Result(layout, compare(reference, ranks, layout, tolerance))


def _run_one(recipe: Recipe, layout: Layout, device: Device, timeout: float, worker: str) -> list[Run]:
    """What the ranks of a layout did."""
    with tempfile.TemporaryDirectory(prefix="megamm_parity_") as work:
        file = Path(work) / "recipe.yaml"
        file.write_text(recipe_to_yaml(layout.applied_to(recipe)))
        threads = max(1, len(os.sched_getaffinity(0)) // layout.world)
        env = {"OMP_NUM_THREADS": str(threads)}
        if device == "cpu":
            env["CUDA_VISIBLE_DEVICES"] = ""  # megatron-core takes a GPU wherever it sees one
        files = run_processes(layout.world, worker, {"recipe": str(file)}, Path(work), timeout, env)
        return [torch.load(path, weights_only=True) for path in files]


def _device(recipe: Recipe, layouts: Sequence[Layout]) -> Device:
    """GPUs if every process of the largest layout can have one of its own."""
    needed = max(layout.world for layout in layouts)
    if recipe.training.device == "cpu" or num_gpus() < needed:
        return "cpu"
    return "cuda"


def _check(layout: Layout, recipe: Recipe) -> None:
    applied = layout.applied_to(recipe)
    try:
        validate(applied)
        validate_world(applied, layout.world)
    except InputError as error:
        raise InputError(f"--layouts: {layout.name!r} does not fit: {error}") from None


def _why_unfit(layout: Layout, recipe: Recipe) -> str:
    """Why the recipe in its own sizes could not have this layout; "" if it could."""
    try:
        validate(layout.applied_to(recipe))
    except InputError as error:
        return f"{layout.name}: the recipe in its own size does not fit: {error}"
    return ""
