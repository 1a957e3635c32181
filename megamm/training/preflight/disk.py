"""Whether the checkpoints of a run can be written, and have room."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megamm.config import ParallelConfig, Recipe
from megamm.engine.manifest import list_checkpoints
from megamm.engine.ranks import describe, gather, on_rank_0
from megamm.planning.parameters import rank_parameters
from megamm.training.preflight.found import Found

GIB = 2**30


def check_disk(recipe: Recipe) -> Found:
    """The run directory: writable by every rank, the same for all, with room for the checkpoints that exist
    at once (collective)."""
    run_dir = Path(recipe.run_dir)
    failure = _failure_to_write(run_dir)
    failures = gather(failure)
    if any(failures):
        return Found([failure] if failure else [])
    found = Found(_not_shared(run_dir))
    if dist.get_rank() == 0:
        found.problems.extend(_no_room(recipe, run_dir))
    return found


def _failure_to_write(run_dir: Path) -> str | None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"checkpoints come here")
    except OSError as error:
        return (
            f"run_dir: {run_dir} cannot be written ({describe(error)}); give another or fix the permissions"
        )
    return None


def _not_shared(run_dir: Path) -> list[str]:
    """All ranks write a checkpoint into one directory; a node that has its own would lose its part."""
    if dist.get_world_size() == 1:
        return []

    def leave_a_mark() -> str:
        handle, path = tempfile.mkstemp(dir=run_dir, prefix=".preflight-")
        os.close(handle)
        return Path(path).name

    failure = f"run_dir: {run_dir} cannot be written"
    mark = run_dir / on_rank_0(leave_a_mark, failure)
    here = mark.exists()
    dist.barrier()
    on_rank_0(mark.unlink, failure)
    if here:
        return []
    return [
        f"run_dir: {run_dir} is not the same directory on all nodes (rank {dist.get_rank()} does not see "
        "what rank 0 wrote); give one on a file system that they share"
    ]


def _no_room(recipe: Recipe, run_dir: Path) -> list[str]:
    existing = len(list_checkpoints(run_dir / "checkpoints")) if (run_dir / "checkpoints").is_dir() else 0
    count = checkpoints_at_once(recipe)
    needed = checkpoint_bytes(recipe, max(0, count - existing), frozen=not existing)
    free = shutil.disk_usage(run_dir).free
    if needed <= free:
        return []
    return [
        f"run_dir: {run_dir} has {free / GIB:.2f} GiB free, and {count} checkpoints (checkpoint.keep "
        f"{recipe.checkpoint.keep}, and the one being written) need {needed / GIB:.2f} GiB; free some, lower "
        "checkpoint.keep, or give another run_dir"
    ]


def checkpoints_at_once(recipe: Recipe) -> int:
    """How many lie in the run directory at most: those that are kept and the one being written."""
    steps, interval = recipe.training.steps, recipe.checkpoint.interval
    ever = math.ceil(steps / interval) if interval else 1
    every = recipe.checkpoint.keep_every
    for_good = steps // math.lcm(every, interval) if every and interval else 0
    return min(recipe.checkpoint.keep + 1 + for_good, ever)


def checkpoint_bytes(recipe: Recipe, count: int, frozen: bool = True) -> int:
    """Bytes of `count` checkpoints: weights and optimizer state (fp32 weights, unless they are the weights,
    and both moments of AdamW); frozen weights are stored once.

    Args:
        frozen: the files of frozen weights do not exist yet.
    """
    full = recipe.training.precision == "fp32"
    weight, state = (4, 8) if full else (2, 12)
    parts = rank_parameters(replace(recipe, parallel=ParallelConfig()), 0).values()
    trained = sum(part.trained for part in parts)
    total = sum(part.total for part in parts)
    return count * trained * (weight + state) + (total - trained) * weight * (frozen and count > 0)
