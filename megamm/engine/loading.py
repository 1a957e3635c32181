"""Loading checkpoints: verified first, into any parallel layout, whole or weights only."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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

_THREADS = 2  # per rank, that hash


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
    newest: int | None = None,
    only_finite: bool = False,
) -> Loaded | None:
    """Load the newest checkpoint whose every byte is as it was written (collective).

    Args:
        directory: the run's `checkpoints` directory.
        models, optimizer: unwrapped chunks of this rank and megatron's optimizer; filled in place.
        recipe: `resume.strict` stops at a damaged checkpoint instead of falling back to an older one; a
            recipe other than the checkpoint's is reported.
        groups: process groups.
        report: takes one line per damaged checkpoint.
        newest: leave out those of later steps; None: look at all.
        only_finite: pass over those with weights or moments that are NaN or infinite.
    Returns:
        The checkpoint; None if there is none, or each one that is not damaged was passed over.
    Raises:
        InputError: checkpoints exist, but none is good (never silently starts from step 0), or the newest
            good one was trained with other frozen parts.
    """
    # rank 0's view decides
    candidates: list[Path] = from_rank_0(lambda: manifests.list_checkpoints(directory, newest))
    damage: list[str] = []
    for checkpoint in candidates:
        try:
            found = _load(checkpoint, models, optimizer, recipe, groups, report, only_finite)
        except DamagedCheckpoint as error:
            if recipe.resume.strict:
                raise
            damage.append(str(error))
            report(f"checkpoint passed over: {error}")
            continue
        if found is not None:
            return found
        report(f"checkpoint passed over: {checkpoint}: has weights or moments that are NaN or infinite")
    if damage and len(damage) == len(candidates):
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
    only_finite: bool,
) -> Loaded | None:
    with SharedVerification(checkpoint, of_a_run=True) as verification:
        manifest = verification.manifest
        if not manifest.has_optimizer:
            raise InputError(
                f"{checkpoint}: holds weights without optimizer state, so no run can go on from it; name it "
                "in training.init_from and take another run_dir"
            )
        if manifest.recipe_sha256 != recipe_hash(recipe):
            report(f"the recipe is not the one that {checkpoint.name} was saved with, see its recipe.yaml")
        state = state_to_load(models, optimizer, groups)
        _refuse_other_optimizer(checkpoint, state["optimizer"])
        loaded = verification.load(state)
    if only_finite and not all(gather(_is_finite(loaded))):
        return None
    load_models(models, loaded)
    load_state(optimizer, loaded["optimizer"])
    return Loaded(checkpoint, manifest)


def _is_finite(state: dict[str, Any]) -> bool:
    tensors = (entry for entry in nested_values(state) if isinstance(entry, torch.Tensor))
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


class SharedVerification:
    """A checkpoint on its way into memory, compared with its manifest meanwhile; the ranks share the hashing,
    and come to the same verdict (collective).

    Attributes:
        manifest: of the checkpoint, whose small files are good.
    Raises:
        DamagedCheckpoint: from `with`, `load` or `wait`, naming each damaged file.
    """

    def __init__(self, checkpoint: Path, of_a_run: bool = False) -> None:
        self._checkpoint, self._of_a_run = checkpoint, of_a_run
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="verify")
        self._jobs: list[Future[list[str]]] = []

    def __enter__(self) -> SharedVerification:
        read = manifests.read_committed if self._of_a_run else manifests.read_manifest
        error: DamagedCheckpoint | None = None
        try:
            self.manifest = read(self._checkpoint)
        except DamagedCheckpoint as unreadable:
            error = unreadable
        if errors := [each for each in gather(error) if each]:
            raise errors[0]
        files = self.manifest.files
        large = sorted((name for name in files if name.endswith(".distcp")), key=lambda n: -files[n].size)
        small = sorted(files.keys() - set(large))
        damage = manifests.find_damage(self._checkpoint, _mine(small), files)
        if any(gather(bool(damage))):  # name all of it
            damage += manifests.find_damage(self._checkpoint, _mine(large), files)
        self._agree(damage)
        self._jobs = [
            self._pool.submit(manifests.find_damage, self._checkpoint, [name], files) for name in _mine(large)
        ]
        return self

    def load(self, state: dict[str, Any]) -> dict[str, Any]:
        """Fill a sharded state dict; returns once every byte was found to be good. See `load_sharded`."""
        try:
            loaded = load_sharded(state, self._checkpoint / "shards")
        except InputError:  # damage may be the reason; all ranks have such an error
            self.wait()
            raise
        self.wait()
        return loaded

    def wait(self) -> None:
        """Return when all ranks have found all files to be good."""
        self._agree([phrase for job in self._jobs for phrase in job.result()])

    def _agree(self, damage: list[str]) -> None:
        manifests.refuse(sorted({phrase for part in gather(damage) for phrase in part}))

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _mine(names: list[str]) -> list[str]:
    return names[dist.get_rank() :: dist.get_world_size()]


def verify_shared_out(checkpoint: Path) -> Manifest:
    """`manifests.verify` with the hashing dealt out over the ranks; all ranks come to the same verdict."""
    with SharedVerification(checkpoint) as verification:
        verification.wait()
    return verification.manifest


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
    with SharedVerification(checkpoint) as verification:
        return _load_weights(checkpoint, models, groups, part_of, verification)


def _load_weights(
    checkpoint: Path,
    models: list[Any],
    groups: Groups,
    part_of: Callable[[str], str],
    verification: SharedVerification,
) -> list[str]:
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
    load_models(models, verification.load(state), strict=False)
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
