"""A run's checkpoints: written while training goes on, committed by manifest."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.config import Recipe
from megamm.engine import frozen as frozen_weights
from megamm.engine import manifest as manifests
from megamm.engine.contents import all_files, describe_run, write_weights
from megamm.engine.frozen import DIRECTORY as FROZEN
from megamm.engine.frozen import FrozenFiles, FrozenWeights
from megamm.engine.groups import Groups
from megamm.engine.held_tensors import HostCopies
from megamm.engine.loading import (
    load_newest,
    load_weights,
    read_recipe,
    read_weights,
    tokenizer_directory,
)
from megamm.engine.manifest import INCOMPLETE, FileEntry, Manifest, Progress, Verification, resolve
from megamm.engine.ranks import describe, gather, gather_on_rank_0, on_rank_0
from megamm.engine.restricted import read_index
from megamm.engine.sharded_files import FileWriter, ShardedSave, WrittenFile
from megamm.engine.sharded_state import CONTENT, model_state, state_to_save
from megamm.engine.weight_files import WeightFiles
from megamm.errors import InputError, RunError
from megamm.recipe import recipe_hash

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

_POLL_INTERVAL = 0.02  # seconds between looks at the other ranks, while nothing else is to be done


@dataclass
class _Pending:
    """A checkpoint whose files are being written.

    Attributes:
        temporary, final: where the files are written, and the name that they get.
        must_succeed: the run cannot go on without it.
        saves: by directory, "shards" and, unless its files are links, "frozen".
        linked: files of frozen weights that an earlier checkpoint has too.
        weights: the frozen ones.
        seconds: that training has stood still for it.
    """

    progress: Progress
    temporary: Path
    final: Path
    must_succeed: bool
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
        self._removal: Future[Any] | None = None  # of old checkpoints; on rank 0
        self._failures = 0  # saves in a row
        self._last_good: Path | None = None

    def load_newest(self, newest: int | None = None, only_finite: bool = False) -> Progress | None:
        """Fill models and optimizer from the newest good checkpoint; see `loading.load_newest`. What killed
        saves have left is removed.

        Args:
            newest: leave out those of later steps; None: look at all.
            only_finite: pass over those with weights or moments that are NaN or infinite.
        """

        def tidy() -> str | None:
            try:
                manifests.tidy(self.directory)
            except OSError as error:
                return describe(error)
            return None

        if failure := on_rank_0(tidy, f"{self.directory}: cannot be read"):
            self.report(f"{self.directory}: what a killed save left cannot be removed ({failure})")
        found = load_newest(
            self.directory,
            self._models,
            self._optimizer,
            self._recipe,
            self._groups,
            self.report,
            newest,
            only_finite,
        )
        if found is None:
            return None
        weights = frozen_weights.find_frozen(model_state(self._models, self._groups))
        self._frozen_files = frozen_weights.loaded_files(found.path, found.manifest.files, weights)
        self._last_good = found.path
        return found.manifest.progress

    def remove_newer(self, step: int) -> None:
        """Delete the checkpoints of later steps, for a run that has gone back to `step`."""
        on_rank_0(
            lambda: manifests.remove_newer(self.directory, step), f"{self.directory}: cannot be changed"
        )

    # --- saving ---------------------------------------------------------------------------------------

    def save(self, progress: Progress, must_succeed: bool = False) -> None:
        """Begin a checkpoint. It exists under its name only once it is complete: at a later `poll`, or when
        this returns if the recipe wants no asynchronous saving. Ends the one before first.

        One that cannot be written is reported, and training goes on, as long as no more than
        `checkpoint.max_failures` fail in a row. All ranks come to know of it, here or at the next
        `poll` or `wait`.

        Args:
            must_succeed: nothing comes after it that could make up for it.
        Raises:
            RunError: it cannot be written and must succeed, or too many in a row could not.
        """
        self._finish()
        started = time.perf_counter()
        final = self.directory / manifests.step_directory(progress.step)
        try:
            self._pending = self._begin(progress, final, must_succeed, started)
        except RunError as error:
            self._tolerate(error, must_succeed)
            return
        self._pending.seconds = time.perf_counter() - started
        if not self._recipe.checkpoint.asynchronous:
            self._finish()

    def _begin(self, progress: Progress, final: Path, must_succeed: bool, started: float) -> _Pending:
        """Write the small files, and start the threads for the large ones."""
        # 1. a fresh directory, which no rank of an earlier start can know; what a killed save left goes
        failure = f"{final}: cannot be written"
        temporary: Path = on_rank_0(partial(self._prepare, final), failure)

        # 2. who writes what; frozen weights only if no earlier checkpoint of this run has them
        state = state_to_save(self._models, self._optimizer, self._groups)
        weights = frozen_weights.find_frozen(state)
        linked = self._link(weights, temporary)
        taken = frozen_weights.take_frozen(state, weights)
        validate = not self._was_validated
        kept = self._copies if self._recipe.checkpoint.asynchronous else None
        saves = {"shards": ShardedSave(state, temporary / "shards", kept, validate)}
        if weights.dtypes and linked is None:  # of all ranks: this one may have none
            saves[FROZEN] = ShardedSave({"model": taken}, temporary / FROZEN, None, validate)
        self._was_validated = True

        # 3. the small files now, the large ones in threads
        def write_small() -> None:
            with _removed_on_failure(temporary):
                for save in saves.values():
                    save.directory.mkdir(exist_ok=True)
                saves["shards"].write_common(dict(CONTENT))
                describe_run(temporary, self._recipe, self._tokenizer)

        on_rank_0(write_small, failure)
        # (frozen weights need not be secured: nothing changes them)
        writer = FileWriter(saves["shards"].files, saves[FROZEN].files if FROZEN in saves else [])
        return _Pending(progress, temporary, final, must_succeed, saves, writer, linked, weights, started)

    def poll(self) -> None:
        """Commit the pending checkpoint if all ranks have written their files; costs nothing without one.

        Raises:
            RunError: a rank could not write, see `save`; on every rank.
        """
        if self._pending is not None:
            self._advance(self._pending)

    def before_update(self) -> None:
        """Secure what the pending checkpoint still needs of the weights and moments as they are: they are
        about to change. Of this rank alone; costs nothing without one."""
        pending = self._pending
        if pending is not None:
            started = time.perf_counter()
            pending.writer.secure(self._copies)
            pending.seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Commit the pending checkpoint, waiting for its files, and until old ones are deleted.

        Raises:
            RunError: a rank could not write, see `save`; on every rank.
        """
        self._finish()
        try:
            self._end_removal()
        except OSError as error:
            self.report(f"warning: {self.directory}: an old checkpoint cannot be deleted ({describe(error)})")

    def _finish(self) -> None:
        started = time.perf_counter()
        while self._pending is not None:
            # short collectives: none of them has to last as long as the slowest rank's disk
            if not self._advance(self._pending, started):
                time.sleep(_POLL_INTERVAL)

    def _advance(self, pending: _Pending, standing_since: float | None = None) -> bool:
        """Commit a checkpoint if its files are written, or give it up if they cannot be; whether it is over.

        Args:
            standing_since: when training began to wait for it.
        """
        started = time.perf_counter() if standing_since is None else standing_since
        try:
            if self._is_anyone_writing(pending):
                return False
            self._commit(pending, started)
        except RunError as error:
            self._pending = None
            self._tolerate(error, pending.must_succeed)
        return True

    def _tolerate(self, error: RunError, must_succeed: bool) -> None:
        """Go on after a failed save, if that is allowed."""
        self._failures += 1
        limit = self._recipe.checkpoint.max_failures
        if must_succeed or self._failures > limit:
            good = (
                f"the last good checkpoint is {self._last_good}" if self._last_good else "there is no other"
            )
            raise RunError(f"{error}; {good}") from error
        good = f"the last good one is {self._last_good.name}" if self._last_good else "there is none yet"
        self.report(
            f"warning: no checkpoint was saved, {good}: {error}; training goes on and tries again "
            f"({self._failures} in a row, {limit} are allowed)"
        )

    def abandon(self) -> None:
        """Give up the pending checkpoint, on this rank alone: the way out when training has failed."""
        if self._pending is not None:
            self._pending.writer.cancel()
            self._pending = None

    def _prepare(self, final: Path) -> Path:
        manifests.tidy(self.directory)
        temporary = self.directory / f"{INCOMPLETE}{final.name}-{secrets.token_hex(4)}"
        with _removed_on_failure(temporary):
            (temporary / "shards").mkdir(parents=True)
        return temporary

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
        raise RunError(f"{pending.final}: cannot be written ({errors[0]}); free space or fix the permissions")

    def _commit(self, pending: _Pending, started: float) -> None:
        """The index of the files, the manifest, and with it the name; old checkpoints go."""
        self._pending = None
        written = gather_on_rank_0(pending.writer.results())
        final = pending.final

        def commit() -> tuple[dict[str, FileEntry], str | None]:
            assert written is not None
            with _removed_on_failure(pending.temporary):
                manifest = self._complete(pending, [file for part in written for file in part])
                manifests.commit(pending.temporary, final, manifest)
            of_frozen = {name: each for name, each in manifest.files.items() if name.startswith(f"{FROZEN}/")}
            return of_frozen, self._remove_old()

        files, remark = on_rank_0(commit, f"{final}: cannot be written")
        self._frozen_files = FrozenFiles(final, files, pending.weights) if files else None
        self._last_good, self._failures = final, 0
        now = time.perf_counter()
        pending.seconds += now - started
        self.report(
            f"saved {final} in {now - pending.started:.1f} s, for {pending.seconds:.1f} s of which training "
            "stood still"
        )
        if remark:
            self.report(remark)

    def _remove_old(self) -> str | None:
        """Begin to delete what need not be kept, which for large files takes a while; returns why it, or that
        of the save before, could not be done (rank 0 alone)."""
        config = self._recipe.checkpoint
        try:
            self._end_removal()
            old = manifests.retire_old(self.directory, config.keep, config.keep_every)
        except (OSError, InputError) as error:
            return f"warning: {self.directory}: old checkpoints cannot be deleted ({describe(error)})"
        pool = ThreadPoolExecutor(1, thread_name_prefix="removal")
        self._removal = pool.submit(_delete, old)
        pool.shutdown(wait=False)
        return None

    def _end_removal(self) -> None:
        """Wait until nothing more is deleted.

        Raises:
            OSError: something could not be.
        """
        removal, self._removal = self._removal, None
        if removal is not None:
            removal.result()

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
            files=all_files(temporary, hashed | (pending.linked.files if pending.linked else {})),
            data_position=pending.progress.data_position,
            data_sources=pending.progress.data_sources,
            anomalies=pending.progress.anomalies,
        )


@contextmanager
def _removed_on_failure(directory: Path) -> Iterator[None]:
    """Leave nothing of a checkpoint that cannot be written: it takes the space that others need."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _delete(directories: list[Path]) -> None:
    for directory in directories:
        shutil.rmtree(directory)
