"""A run's checkpoints: written while training goes on, committed by manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.config import Recipe
from megamm.engine import frozen as frozen_weights
from megamm.engine import manifest as manifests
from megamm.engine.frozen import DIRECTORY as FROZEN
from megamm.engine.frozen import FrozenFiles, FrozenWeights
from megamm.engine.groups import Groups
from megamm.engine.loading import (
    load_newest,
    load_weights,
    read_recipe,
    read_weights,
    tokenizer_directory,
)
from megamm.engine.manifest import FileEntry, Manifest, Progress, Verification, resolve
from megamm.engine.ranks import describe, gather, gather_on_rank_0, on_rank_0
from megamm.engine.sharded_files import (
    FileWriter,
    HostCopies,
    ShardedSave,
    WrittenFile,
    read_index,
)
from megamm.engine.sharded_state import CONTENT, model_state, state_to_save
from megamm.engine.weight_files import StreamedTensor, WeightFiles, whole_tensors, write_streamed
from megamm.errors import InputError, RunError
from megamm.recipe import recipe_hash, recipe_to_yaml

__all__ = [
    "Checkpoints",
    "Progress",
    "Verification",
    "WeightFiles",
    "load_weights",
    "read_recipe",
    "read_weights",
    "resolve",
    "tokenizer_directory",
    "write_weights",
]

_INCOMPLETE = ".incomplete-"  # prefix of a checkpoint that is being written
_POLL_INTERVAL = 0.02  # seconds between looks at the other ranks, while nothing else is to be done


@dataclass
class _Pending:
    """A checkpoint whose files are being written.

    Attributes:
        saves: by directory, "shards" and, unless its files are links, "frozen".
        linked: files of frozen weights that an earlier checkpoint has too.
        weights: the frozen ones.
        seconds: that training has stood still for it.
    """

    progress: Progress
    temporary: Path
    saves: dict[str, ShardedSave]
    writer: FileWriter
    linked: FrozenFiles | None
    weights: FrozenWeights
    started: float
    seconds: float = 0.0


class Checkpoints:
    """The checkpoints of a run. Every method is called by all ranks together, unless it says otherwise.

    Args:
        directory: the run's `checkpoints` directory.
        models: unwrapped chunks of this rank.
        optimizer: megatron's, over the wrapped chunks.
        recipe: stored beside the weights; `checkpoint` and `resume` say how to save and load.
        tokenizer: writes the tokenizer into a directory.
        groups: process groups.
        report: takes lines for the log; on rank 0.
    """

    def __init__(
        self,
        directory: Path,
        models: list[Any],
        optimizer: Any,
        recipe: Recipe,
        tokenizer: Callable[[Path], object],
        groups: Groups,
        report: Callable[[str], None],
    ) -> None:
        self.directory = directory
        self.report = report
        self._models, self._optimizer = models, optimizer
        self._recipe, self._tokenizer, self._groups = recipe, tokenizer, groups
        self._pending: _Pending | None = None
        self._frozen_files: FrozenFiles | None = None  # that the next checkpoint may link
        self._copies = HostCopies()
        self._was_validated = False
        self._link_failure: str | None = None

    def load_newest(self, newest: int | None = None) -> Progress | None:
        """Fill models and optimizer from the newest good checkpoint; see `loading.load_newest`.

        Args:
            newest: leave out those of later steps; None: look at all.
        """
        found = load_newest(
            self.directory, self._models, self._optimizer, self._recipe, self._groups, self.report, newest
        )
        if found is None:
            return None
        weights = frozen_weights.find_frozen(model_state(self._models, self._groups))
        self._frozen_files = frozen_weights.loaded_files(found.path, found.manifest.files, weights)
        return found.manifest.progress

    def remove_newer(self, step: int) -> None:
        """Delete the checkpoints of later steps, for a run that has gone back to `step`."""
        on_rank_0(
            lambda: manifests.remove_newer(self.directory, step), f"{self.directory}: cannot be changed"
        )

    # --- saving ---------------------------------------------------------------------------------------

    def save(self, progress: Progress) -> None:
        """Begin a checkpoint. It exists under its name only once it is complete: at a later `poll`, or when
        this returns if the recipe wants no asynchronous saving. Ends the one before first.

        Raises:
            RunError: this or the one before cannot be written.
        """
        self.wait()
        started = time.perf_counter()
        temporary = self.directory / f"{_INCOMPLETE}{manifests.step_directory(progress.step)}"
        is_asynchronous = self._recipe.checkpoint.asynchronous

        # 1. a fresh directory; what a killed save left behind goes
        on_rank_0(partial(self._prepare, temporary), f"{temporary}: cannot be created")

        # 2. who writes what; frozen weights only if no earlier checkpoint of this run has them
        state = state_to_save(self._models, self._optimizer, self._groups)
        weights = frozen_weights.find_frozen(state)
        linked = self._link(weights, temporary)
        taken = frozen_weights.take_frozen(state, weights)
        validate = not self._was_validated
        copies = self._copies if is_asynchronous else None
        saves = {"shards": ShardedSave(state, temporary / "shards", copies, validate)}
        if weights.dtypes and linked is None:  # of all ranks: this one may have none
            # no copies: nothing changes them before they are written
            saves[FROZEN] = ShardedSave({"model": taken}, temporary / FROZEN, None, validate)
        self._was_validated = True

        # 3. the small files now, the large ones in threads
        def write_small() -> None:
            for save in saves.values():
                save.directory.mkdir(exist_ok=True)
            saves["shards"].write_common(dict(CONTENT))
            _describe(temporary, self._recipe, self._tokenizer)

        on_rank_0(write_small, f"{temporary}: cannot be written")
        writer = FileWriter([file for save in saves.values() for file in save.files])
        self._pending = _Pending(progress, temporary, saves, writer, linked, weights, started)
        self._pending.seconds = time.perf_counter() - started
        if not is_asynchronous:
            self.wait()

    def poll(self) -> None:
        """Commit the pending checkpoint if all ranks have written their files; costs nothing without one.

        Raises:
            RunError: a rank could not write; on every rank.
        """
        if self._pending is not None and not self._is_anyone_writing(self._pending):
            self._commit(self._pending)

    def wait(self) -> None:
        """Commit the pending checkpoint, waiting for its files.

        Raises:
            RunError: a rank could not write; on every rank.
        """
        started = time.perf_counter()
        while self._pending is not None:
            # short collectives: none of them has to last as long as the slowest rank's disk
            if self._is_anyone_writing(self._pending):
                time.sleep(_POLL_INTERVAL)
            else:
                self._pending.seconds += time.perf_counter() - started
                self._commit(self._pending)

    def abandon(self) -> None:
        """Give up the pending checkpoint, on this rank alone: the way out when training has failed."""
        if self._pending is not None:
            self._pending.writer.cancel()
            self._pending = None

    def _prepare(self, temporary: Path) -> None:
        for left in self.directory.glob(f"{_INCOMPLETE}*"):
            shutil.rmtree(left)
        (temporary / "shards").mkdir(parents=True)

    def _link(self, weights: FrozenWeights, temporary: Path) -> FrozenFiles | None:
        """Take over the files of frozen weights from the checkpoint before, if they are the same."""
        files = self._frozen_files
        if not frozen_weights.hold_the_same(files, weights) or files is None:
            return None
        failure = on_rank_0(lambda: frozen_weights.link(files, temporary), f"{temporary}: cannot be linked")
        if failure is None:
            return files
        if failure != self._link_failure:  # said once where the file system has no hard links
            self.report(f"the files of frozen weights could not be linked ({failure}) and are written again")
            self._link_failure = failure
        return None

    def _is_anyone_writing(self, pending: _Pending) -> bool:
        """Whether a rank still writes; if one has failed, all give up.

        Raises:
            RunError: on every rank.
        """
        flags = torch.tensor(
            [pending.writer.is_running, pending.writer.error is not None],
            dtype=torch.int32,
            device=self._groups.device,
        )
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        is_running, has_failed = (bool(flag) for flag in flags.tolist())
        if has_failed:
            self._give_up(pending)
        return is_running

    def _give_up(self, pending: _Pending) -> None:
        error = pending.writer.error
        self.abandon()
        errors = [text for text in gather(describe(error) if error else None) if text]
        if dist.get_rank() == 0:
            shutil.rmtree(pending.temporary, ignore_errors=True)
        raise RunError(
            f"{pending.temporary}: cannot be written ({errors[0]}); free space or fix the permissions"
        )

    def _commit(self, pending: _Pending) -> None:
        """The index of the files, the manifest, and with it the name; old checkpoints go."""
        started = time.perf_counter()
        self._pending = None
        written = gather_on_rank_0(pending.writer.results())
        final = self.directory / manifests.step_directory(pending.progress.step)

        def commit() -> dict[str, FileEntry]:
            assert written is not None
            manifest = self._complete(pending, [file for part in written for file in part])
            manifests.commit(pending.temporary, final, manifest)
            manifests.remove_old(self.directory, self._recipe.checkpoint.keep)
            return {name: entry for name, entry in manifest.files.items() if name.startswith(f"{FROZEN}/")}

        files = on_rank_0(commit, f"{final}: cannot be committed")
        self._frozen_files = FrozenFiles(final, files, pending.weights) if files else None
        now = time.perf_counter()
        pending.seconds += now - started
        self.report(
            f"saved {final} in {now - pending.started:.1f} s, for {pending.seconds:.1f} s of which training "
            "stood still"
        )

    def _complete(self, pending: _Pending, written: list[WrittenFile]) -> Manifest:
        """Write the indices, and describe every file (rank 0 alone)."""
        temporary, groups = pending.temporary, self._groups
        results = {
            name: [result for file in written if file.path.parent.name == name for result in file.results]
            for name in pending.saves
        }
        referenced = {}
        if FROZEN in pending.saves:
            referenced[f"../{FROZEN}"] = pending.saves[FROZEN].complete(results[FROZEN])
        elif pending.linked is not None:
            referenced[f"../{FROZEN}"] = read_index(temporary / FROZEN)
        pending.saves["shards"].complete(results["shards"], referenced)
        hashed = {file.path.relative_to(temporary).as_posix(): file.entry for file in written}
        return Manifest(
            step=pending.progress.step,
            consumed_samples=pending.progress.consumed_samples,
            layout={"tensor": groups.tp_size, "pipeline": groups.pp_size, "data": groups.dp_size},
            recipe_sha256=recipe_hash(self._recipe),
            has_optimizer=True,
            files=_all_files(temporary, hashed | (pending.linked.files if pending.linked else {})),
            data_position=pending.progress.data_position,
            data_sources=pending.progress.data_sources,
            anomalies=pending.progress.anomalies,
        )


def _describe(directory: Path, recipe: Recipe, tokenizer: Callable[[Path], object] | None) -> None:
    (directory / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    if tokenizer is not None:
        tokenizer(directory / "tokenizer")


def _all_files(directory: Path, hashed: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """Size and hash of every file below `directory`; only those not yet `hashed` are read."""
    names = manifests.files_below(directory)
    return {name: hashed.get(name) or manifests.hash_file(directory / name) for name in names}


def write_weights(
    out: Path,
    tensors: Mapping[str, torch.Tensor] | Iterable[StreamedTensor],
    recipe: Recipe,
    tokenizer: Path | None,
) -> Path:
    """Write a checkpoint of weights only, from one process; any layout can load it.

    Args:
        out: the checkpoint's directory; must not exist.
        tensors: whole tensors by their checkpoint names, or such as are made when they are written.
        recipe: describes the model.
        tokenizer: directory that is copied along, if there is one.
    Raises:
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: already exists; choose another --out or remove it")
    streamed = whole_tensors(tensors) if isinstance(tensors, Mapping) else tensors
    temporary = out.parent / f"{_INCOMPLETE}{out.name}"
    try:
        (temporary / "shards").mkdir(parents=True)
        written = write_streamed(streamed, temporary / "shards")
        _describe(temporary, recipe, partial(shutil.copytree, tokenizer) if tokenizer else None)
        hashed = {path.relative_to(temporary).as_posix(): entry for path, entry in written.items()}
        layout = {"tensor": 1, "pipeline": 1, "data": 1}
        manifest = Manifest(0, 0, layout, recipe_hash(recipe), False, _all_files(temporary, hashed))
        # what the weights came from is still there: no need to wait for the disk
        manifests.commit(temporary, out, manifest, durable=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
