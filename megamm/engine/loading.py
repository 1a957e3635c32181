"""Loading checkpoints: verified first, into any parallel layout, whole or weights only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megamm.config import Recipe
from megamm.engine import manifest as manifests
from megamm.engine.groups import Groups
from megamm.engine.manifest import DamagedCheckpoint, Manifest
from megamm.engine.optimizer_state import groups_of, load_state
from megamm.engine.ranks import from_rank_0, gather
from megamm.engine.restricted import read_common, read_index
from megamm.engine.sharded_files import load_sharded, saved_tensors, tensors_of
from megamm.engine.sharded_state import chunk_key, model_state, state_to_load
from megamm.engine.weight_files import WeightFiles
from megamm.errors import InputError
from megamm.recipe import load_recipe, recipe_hash


@dataclass(frozen=True)
class Loaded:
    """The checkpoint that models and optimizer were filled from."""

    path: Path
    manifest: Manifest


def load_newest(
    directory: Path,
    models: list[Any],
    optimizer: Any,
    recipe: Recipe,
    groups: Groups,
    report: Callable[[str], None],
) -> Loaded | None:
    """Load the newest checkpoint whose every byte is as it was written (collective).

    Args:
        directory: the run's `checkpoints` directory.
        models, optimizer: unwrapped chunks of this rank and megatron's optimizer; filled in place.
        recipe: `resume.strict` stops at a damaged checkpoint instead of falling back to an older one; a
            recipe other than the checkpoint's is reported.
        groups: process groups.
        report: takes one line per damaged checkpoint.
    Returns:
        The checkpoint; None if there is none at all.
    Raises:
        InputError: checkpoints exist, but none is good (never silently starts from step 0), or the newest
            good one was trained with other frozen parts.
    """
    # rank 0's view decides
    candidates: list[Path] = from_rank_0(lambda: manifests.list_checkpoints(directory))
    damage: list[str] = []
    for checkpoint in candidates:
        try:
            return _load(checkpoint, models, optimizer, recipe, groups, report)
        except DamagedCheckpoint as error:
            if recipe.resume.strict:
                raise
            damage.append(str(error))
            report(f"checkpoint passed over: {error}")
    if candidates:
        raise InputError(
            f"{directory}: every checkpoint is damaged ({' | '.join(damage)}); restore one, or start over "
            "with another run_dir"
        )
    return None


def _load(
    checkpoint: Path,
    models: list[Any],
    optimizer: Any,
    recipe: Recipe,
    groups: Groups,
    report: Callable[[str], None],
) -> Loaded:
    manifest = verify_shared_out(checkpoint, of_a_run=True)
    if not manifest.has_optimizer:
        raise InputError(
            f"{checkpoint}: holds weights without optimizer state, so no run can go on from it; name it "
            "in training.init_from and take another run_dir"
        )
    if manifest.recipe_sha256 != recipe_hash(recipe):
        report(f"the recipe is not the one that {checkpoint.name} was saved with, see its recipe.yaml")
    state = state_to_load(models, optimizer, groups)
    _refuse_other_optimizer(checkpoint, state["optimizer"])
    loaded = load_sharded(state, checkpoint / "shards")
    load_models(models, loaded)
    load_state(optimizer, loaded["optimizer"])
    return Loaded(checkpoint, manifest)


def verify_shared_out(checkpoint: Path, of_a_run: bool = False) -> Manifest:
    """`manifests.verify` with the hashing dealt out over the ranks; all ranks come to the same verdict."""
    read = manifests.read_committed if of_a_run else manifests.read_manifest
    try:
        manifest: Manifest | None = read(checkpoint)
        names = sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()] if manifest else []
        damage = manifests.find_damage(checkpoint, names, manifest.files) if manifest else []
        unreadable: list[str] = []
    except DamagedCheckpoint as error:
        manifest, damage, unreadable = None, [], [str(error)]
    everywhere = gather((damage, unreadable))
    for sentence in (text for _, part in everywhere for text in part):
        raise DamagedCheckpoint(sentence)
    manifests.refuse([phrase for part, _ in everywhere for phrase in part])
    assert manifest is not None
    return manifest


def _refuse_other_optimizer(checkpoint: Path, optimizer_state: dict[str, Any]) -> None:
    """Optimizer state fits only the weights that it was made for.

    Raises:
        InputError: the recipe trains other weights than the checkpoint's did, or another optimizer.
    """
    entries = nested_values(optimizer_state)
    mine = {e.key for e in entries if isinstance(e, ShardedTensor | ShardedTensorFactory)}
    wanted = {name for part in gather(mine) for name in part}
    saved = {n for n in tensors_of(read_index(checkpoint / "shards")) if n.startswith("optimizer.")}
    if wanted == saved:
        _refuse_other_groups(checkpoint, optimizer_state)
        return
    # "optimizer.state.exp_avg.language.output_layer.weight": the weight stands behind the third dot
    trained, had = ({name.split(".", 3)[3] for name in names} for names in (wanted, saved))
    if trained == had:
        raise InputError(
            f"{checkpoint}: its optimizer state is of another kind; set parallel.distributed_optimizer and "
            "training.precision as in its recipe.yaml"
        )
    only_now, only_then = sorted(trained - had), sorted(had - trained)
    differences = [
        f"{len(names)} weights are trained {when}, such as {names[0]}"
        for names, when in ((only_now, "only now"), (only_then, "only there"))
        if names
    ]
    raise InputError(
        f"{checkpoint}: was trained with other frozen parts than this recipe's ({'; '.join(differences)}), "
        "so its optimizer state does not fit; set training.freeze and training.unfreeze as in its "
        "recipe.yaml, or start a new stage with training.init_from and another run_dir"
    )


def _refuse_other_groups(checkpoint: Path, optimizer_state: dict[str, Any]) -> None:
    """The replicated optimizer's state is kept by parameter groups, so it fits only as many as it had."""
    groups = groups_of(optimizer_state)
    if not any("params" in group for group in groups):
        return
    there = groups_of(read_common(checkpoint / "shards")["optimizer"])
    if len(there) != len(groups):
        raise InputError(
            f"{checkpoint}: its optimizer state is that of {len(there)} groups of weights, and this recipe "
            f"makes {len(groups)}; set optimizer.parts and optimizer.no_decay as in its recipe.yaml (only "
            "parallel.distributed_optimizer, from the start, allows others)"
        )


def load_models(models: list[Any], state: dict[str, Any], strict: bool = True) -> None:
    """Put loaded state dicts into the chunks of this rank."""
    for i, model in enumerate(models):
        model.load_state_dict(state.get(chunk_key(models, i), {}), strict=strict)


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
        InputError: the checkpoint is damaged, has only some of the tensors of a part, or has a part that the
            model lacks.
    """
    verify_shared_out(checkpoint)
    saved = saved_tensors(checkpoint / "shards")
    state = model_state(models, groups)
    wanted: set[str] = set()
    for chunk in state.values():
        keys = {name: getattr(entry, "key", name) for name, entry in chunk.items()}
        wanted |= {key for key in keys.values() if not key.endswith("_extra_state")}
        for name, key in keys.items():
            if key not in saved:
                del chunk[name]
    # all ranks together hold the whole model, and so come to the same verdict
    everywhere = {key for part in gather(wanted) for key in part}
    missing = {part_of(key) for key in everywhere - saved.keys()}
    present = {part_of(key) for key in everywhere & saved.keys()}
    if left_over := {part_of(key) for key in saved} - missing - present:
        raise InputError(
            f"{checkpoint}: has weights of {', '.join(sorted(left_over))}, which would be lost, because the "
            "recipe's model has no such part; describe it in the model section, as the checkpoint's "
            "recipe.yaml does"
        )
    unknown = {key for key in saved.keys() - everywhere if part_of(key) in present}
    if missing & present or unknown:
        names = sorted(unknown | {key for key in everywhere - saved.keys() if part_of(key) in present})
        raise InputError(
            f"{checkpoint}: holds another model than the recipe's model section describes ({len(names)} "
            f"weights differ, among them {names[0]}); give a checkpoint of that model"
        )
    load_models(models, load_sharded(state, checkpoint / "shards"), strict=False)
    return sorted(missing)


# --- one process, no training -------------------------------------------------------------------------


def read_recipe(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was made with."""
    return load_recipe(checkpoint / "recipe.yaml")


def tokenizer_directory(checkpoint: Path) -> Path:
    """Where a checkpoint keeps its tokenizer."""
    return checkpoint / "tokenizer"


def read_weights(checkpoint: Path) -> WeightFiles:
    """All weights as whole tensors by name, read when asked for; verified first; needs no process group.

    Raises:
        InputError: the checkpoint is damaged.
    """
    manifests.verify(checkpoint)
    return WeightFiles(checkpoint / "shards")
