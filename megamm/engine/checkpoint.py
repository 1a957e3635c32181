"""Saving and loading checkpoints in any parallel layout; committed by manifest, verified before use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.config import ParallelConfig, Recipe
from megamm.engine import groups as process_groups
from megamm.engine import manifest as manifests
from megamm.engine.groups import Groups
from megamm.engine.manifest import Manifest, resolve
from megamm.engine.sharded_files import load_sharded, read_tensors, save_sharded, saved_tensors, write_tensors
from megamm.errors import InputError, RunError
from megamm.recipe import load_recipe, recipe_hash, recipe_to_yaml

__all__ = [
    "Progress",
    "load_newest",
    "load_weights",
    "read_recipe",
    "read_weights",
    "resolve",
    "save",
    "tokenizer_directory",
    "write_weights",
]

# Optimizer state is saved in the model's own shapes, so that any layout can load any other's.
# ("fully_sharded_model_space", megatron's default, is refused by its own loader in 0.16.)
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


_INCOMPLETE = ".incomplete-"  # prefix of a checkpoint that is being written


@dataclass(frozen=True)
class Progress:
    """How far a stage has come."""

    step: int = 0
    consumed_samples: int = 0


def _metadata(groups: Groups) -> dict[str, Any]:
    return {**_CONTENT, "dp_cp_group": groups.collection.dp_cp}


def _state(models: list[Any], optimizer: Any, groups: Groups, is_loading: bool) -> dict[str, Any]:
    metadata = _metadata(groups)
    state: dict[str, Any] = {}
    for i, model in enumerate(models):
        key = f"model{i}" if len(models) > 1 else "model"
        state[key] = model.sharded_state_dict(metadata=metadata)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def save(
    directory: Path,
    progress: Progress,
    models: list[Any],
    optimizer: Any,
    recipe: Recipe,
    tokenizer: Callable[[Path], None],
    groups: Groups,
) -> Path:
    """Write one checkpoint (collective). It exists under its name only once it is complete.

    Args:
        directory: the run's `checkpoints` directory.
        progress: step and consumed samples.
        models: unwrapped chunks of this rank.
        optimizer: megatron's, over the wrapped chunks.
        recipe: stored beside the weights.
        tokenizer: writes the tokenizer into a directory.
        groups: process groups.
    """
    name = manifests.step_directory(progress.step)
    temporary = directory / f"{_INCOMPLETE}{name}"

    # 1. a fresh directory; what a killed save left behind goes
    def prepare() -> None:
        for left in directory.glob(f"{_INCOMPLETE}*"):
            shutil.rmtree(left)
        (temporary / "shards").mkdir(parents=True)

    _on_rank_0(prepare, f"{temporary}: cannot be created")

    # 2. weights and optimizer state, written by all ranks; recipe and tokenizer
    save_sharded(_state(models, optimizer, groups, is_loading=False), temporary / "shards", dict(_CONTENT))
    _on_rank_0(lambda: _describe(temporary, recipe, tokenizer), f"{temporary}: cannot be written")

    # 3. the manifest, and with it the name
    hashes = _hash_shared_out(temporary)
    manifest = Manifest(
        step=progress.step,
        consumed_samples=progress.consumed_samples,
        layout={"tensor": groups.tp_size, "pipeline": groups.pp_size, "data": groups.dp_size},
        recipe_sha256=recipe_hash(recipe),
        has_optimizer=True,
        files={key: entry for part in hashes for key, entry in part.items()},
    )

    def commit() -> None:
        manifests.commit(temporary, directory / name, manifest)
        manifests.remove_old(directory, recipe.checkpoint.keep)

    _on_rank_0(commit, f"{directory / name}: cannot be committed")
    return directory / name


def _describe(directory: Path, recipe: Recipe, tokenizer: Callable[[Path], object] | None) -> None:
    (directory / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    if tokenizer is not None:
        tokenizer(directory / "tokenizer")


def _hash_shared_out(directory: Path) -> list[dict[str, manifests.FileEntry]]:
    """Every rank hashes its share of the files; all know all hashes."""
    names = manifests.files_below(directory)[dist.get_rank() :: dist.get_world_size()]
    return _gather({name: manifests.hash_file(directory / name) for name in names})


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _on_rank_0(action: Callable[[], None], failure: str) -> None:
    """Run `action` on rank 0; if it fails, every rank raises the same error instead of waiting."""
    error = None
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as os_error:
            error = f"{failure} ({os_error.strerror or os_error}); free space or fix the permissions"
    errors = [e for e in _gather(error) if e]
    if errors:
        raise RunError(errors[0])


# --- loading ------------------------------------------------------------------------------------------


def load_newest(
    directory: Path,
    models: list[Any],
    optimizer: Any,
    recipe: Recipe,
    groups: Groups,
    report: Callable[[str], None],
) -> Progress | None:
    """Load the newest checkpoint whose every byte is as it was written (collective).

    Args:
        directory: the run's `checkpoints` directory.
        models, optimizer, groups: as for `save`; filled in place.
        recipe: `resume.strict` stops at a damaged checkpoint instead of falling back to an older one; a
            recipe other than the checkpoint's is reported.
        report: takes one line per damaged checkpoint.
    Returns:
        How far the run had come; None if there is no checkpoint at all.
    Raises:
        InputError: checkpoints exist, but none is good (never silently starts from step 0).
    """
    candidates = _gather(manifests.list_checkpoints(directory))[0]  # rank 0's view decides
    damage: list[str] = []
    for checkpoint in candidates:
        try:
            manifest = _verify_shared_out(checkpoint)
        except InputError as error:
            if recipe.resume.strict:
                raise
            damage.append(str(error))
            report(f"checkpoint passed over: {error}")
            continue
        if not manifest.has_optimizer:
            raise InputError(
                f"{checkpoint}: holds weights without optimizer state, so no run can go on from it; name it "
                "in training.init_from and take another run_dir"
            )
        if manifest.recipe_sha256 != recipe_hash(recipe):
            report(f"the recipe is not the one that {checkpoint.name} was saved with, see its recipe.yaml")
        _load_into(checkpoint, models, optimizer, groups)
        return Progress(manifest.step, manifest.consumed_samples)
    if candidates:
        raise InputError(
            f"{directory}: every checkpoint is damaged ({' | '.join(damage)}); restore one, or start over "
            "with another run_dir"
        )
    return None


def _verify_shared_out(checkpoint: Path) -> Manifest:
    """`manifests.verify` with the hashing dealt out over the ranks; all ranks come to the same verdict."""
    try:
        manifest: Manifest | None = manifests.read_manifest(checkpoint)
        names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()] if manifest else []
        damage = manifests.find_damage(checkpoint, names, manifest.files) if manifest else []
    except InputError as error:
        manifest, damage = None, [str(error)]
    everywhere = [phrase for part in _gather(damage) for phrase in part]
    if everywhere or manifest is None:
        raise InputError(
            "; ".join(dict.fromkeys(everywhere)) + "; use another checkpoint or restore the file"
        )
    return manifest


def _load_into(checkpoint: Path, models: list[Any], optimizer: Any, groups: Groups) -> None:
    state = load_sharded(_state(models, optimizer, groups, is_loading=True), checkpoint / "shards")
    _load_models(models, state)
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])


def _load_models(models: list[Any], state: dict[str, Any], strict: bool = True) -> None:
    for i, model in enumerate(models):
        key = f"model{i}" if len(models) > 1 else "model"
        model.load_state_dict(state.get(key, {}), strict=strict)


def load_weights(
    checkpoint: Path, models: list[Any], groups: Groups, part_of: Callable[[str], str]
) -> list[str]:
    """Load only the weights, verified first; parts that the checkpoint lacks altogether keep theirs.

    Args:
        checkpoint: a committed checkpoint, of any layout.
        models: unwrapped chunks, filled in place.
        groups: process groups.
        part_of: the part of the model a parameter belongs to.
    Returns:
        The parts that the checkpoint does not have.
    Raises:
        InputError: the checkpoint is damaged, or has only some of the tensors of a part.
    """
    _verify_shared_out(checkpoint)
    saved = saved_tensors(checkpoint / "shards")
    state = _state(models, None, groups, is_loading=True)
    wanted: set[str] = set()
    for chunk in state.values():
        keys = {name: getattr(entry, "key", name) for name, entry in chunk.items()}
        wanted |= {key for key in keys.values() if not key.endswith("_extra_state")}
        for name, key in keys.items():
            if key not in saved:
                del chunk[name]
    # all ranks together hold the whole model, and so come to the same verdict
    everywhere = {key for part in _gather(wanted) for key in part}
    missing = {part_of(key) for key in everywhere - saved.keys()}
    present = {part_of(key) for key in everywhere & saved.keys()}
    unknown = {key for key in saved.keys() - everywhere if part_of(key) in present}
    if missing & present or unknown:
        names = sorted(unknown | {key for key in everywhere - saved.keys() if part_of(key) in present})
        raise InputError(
            f"{checkpoint}: holds another model than the recipe's model section describes ({len(names)} "
            f"weights differ, among them {names[0]}); give a checkpoint of that model"
        )
    _load_models(models, load_sharded(state, checkpoint / "shards"), strict=False)
    return sorted(missing)


# --- one process, no training -------------------------------------------------------------------------


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was made with."""
    return load_recipe(checkpoint / "recipe.yaml")


def tokenizer_directory(checkpoint: Path) -> Path:
    """Where a checkpoint keeps its tokenizer."""
    return checkpoint / "tokenizer"


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All weights as whole tensors by name; verified first; needs no process group."""
    manifests.verify(checkpoint)
    return read_tensors(checkpoint / "shards")


def write_weights(
    out: Path, tensors: dict[str, torch.Tensor], recipe: Recipe, tokenizer: Path | None
) -> Path:
    """Write a checkpoint of weights only, from one process; any layout can load it.

    Args:
        out: the checkpoint's directory; must not exist.
        tensors: whole tensors by their checkpoint names.
        recipe: describes the model.
        tokenizer: directory that is copied along, if there is one.
    Raises:
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: already exists; choose another --out or remove it")
    owns_groups = not dist.is_initialized()
    process_groups.initialize(ParallelConfig(), torch.device("cpu"), "gloo")
    temporary = out.parent / f"{_INCOMPLETE}{out.name}"
    try:
        (temporary / "shards").mkdir(parents=True)
        write_tensors(tensors, temporary / "shards")
        _describe(temporary, recipe, partial(shutil.copytree, tokenizer) if tokenizer else None)
        files = {name: manifests.hash_file(temporary / name) for name in manifests.files_below(temporary)}
        manifest = Manifest(0, 0, {"tensor": 1, "pipeline": 1, "data": 1}, recipe_hash(recipe), False, files)
        manifests.commit(temporary, out, manifest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if owns_groups:
            process_groups.shutdown()
    return out
