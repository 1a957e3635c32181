"""Distributed checkpoint files (torch_dist format): megatron-core's names and layout, written by threads.

Writing has three parts, so that training can go on during the second:
1. `ShardedSave(...)`: the ranks agree on who writes what (collective);
2. `FileWriter`: threads of this rank write and hash its files (no communication), from where the tensors lie
   until training is about to change them: what is not written by then is copied (`secure`);
3. `ShardedSave.complete`: rank 0 writes the directory's index, once all ranks are done.

megatron's own writer starts a multiprocessing Manager and forks a process per file: seconds per save, and
an orphan when a rank is killed. Threads write the same bytes.
"""

from __future__ import annotations

import io
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megamm.engine.archives import archive_around
from megamm.engine.hashed_file import HashedFile
from megamm.engine.held_tensors import HeldTensor, HostCopies
from megamm.engine.manifest import DamagedCheckpoint, FileEntry
from megamm.engine.ranks import gather, gather_on_rank_0
from megamm.engine.restricted import COMMON, RestrictedCommon, read_common, read_index
from megamm.errors import InputError

_THREADS = 2  # files per rank and directory


@dataclass
class PlannedFile:
    """One file of this rank, and what goes into it.

    Attributes:
        items: megatron's description of each item, and its value on the host.
    """

    path: Path
    items: list[tuple[WriteItem, HeldTensor | io.BytesIO]]


@dataclass(frozen=True)
class WrittenFile:
    """One file on the disk.

    Attributes:
        results: where in the file each item lies.
        entry: size and hash.
    """

    path: Path
    results: list[WriteResult]
    entry: FileEntry


class ShardedSave:
    """A sharded state dict on its way into a directory (collective over all ranks).

    Args:
        state: changed on the way.
        directory: does not have to exist before the files are written.
        copies: memory for copies of tensors that lie on a device, kept for the next save; None: it is not.
        validate: check first that the ranks' shards make up whole tensors.
    Attributes:
        files: of this rank, to be written.
        common: what is the same on all ranks, and lies in no shard.
    """

    def __init__(
        self, state: dict[str, Any], directory: Path, copies: HostCopies | None, validate: bool = True
    ) -> None:
        self.directory = directory
        sharded, self.common = save_preprocess(state, validate)
        flat = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)[0]
        planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(torch_dist.mcore_to_pyt_state_dict(flat), is_coordinator=dist.get_rank() == 0)
        plan = planner.create_local_plan()
        plans = gather_on_rank_0(plan)
        self._metadata: Metadata | None = planner.create_global_plan(plans)[1] if plans is not None else None
        self.files: list[PlannedFile] = []
        for number, items in enumerate(_split_by_size_and_type(_THREADS, plan.items)):
            if items:
                values = [(item, _on_host(item, planner.resolve_data(item), copies)) for item in items]
                self.files.append(PlannedFile(directory / f"__{dist.get_rank()}_{number}.distcp", values))
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies were only started

    def complete(self, results: list[WriteResult], referenced: dict[str, Metadata] | None = None) -> Metadata:
        """Write the index (rank 0 alone, after all files of all ranks).

        Args:
            results: of all ranks.
            referenced: indices of other directories, by their path seen from this one, whose tensors are
                to be found through this index too.
        Returns:
            The index.
        """
        assert self._metadata is not None
        for path, other in (referenced or {}).items():
            self._metadata.state_dict_metadata.update(other.state_dict_metadata)
            for index, info in other.storage_data.items():
                moved = replace(info, relative_path=f"{path}/{info.relative_path}")
                results = [*results, WriteResult(index, info.length, moved)]
        dcp.FileSystemWriter(self.directory).finish(self._metadata, [results])
        return self._metadata

    def write_common(self, content_metadata: dict[str, Any]) -> None:
        """Write what makes the directory one that megatron-core loads by itself (rank 0 alone)."""
        write_common(self.common, content_metadata, self.directory)


def write_common(common: dict[str, Any], content_metadata: dict[str, Any], directory: Path) -> None:
    """Write the small files of a directory: what lies in no shard, and the name of the format."""
    content = io.BytesIO()  # written to a path, torch.save reports a full disk as a RuntimeError
    torch.save({**common, "content_metadata": content_metadata}, content)
    (directory / COMMON).write_bytes(content.getbuffer())
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))


def _on_host(item: WriteItem, value: Any, copies: HostCopies | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if value.is_cuda:
        copy = copies.copy(item.index, value) if copies else value.to("cpu", non_blocking=True)
        return HeldTensor(item.index, copy, is_secure=True)
    return HeldTensor(item.index, value)


class FileWriter:
    """Threads that write and hash this rank's files.

    Args:
        files: of what training changes.
        constant: of what it does not.
    """

    def __init__(self, files: list[PlannedFile], constant: list[PlannedFile]) -> None:
        self._cancelled = Event()
        self._changing = files
        files = [*files, *constant]
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checkpoint")
        self._futures: list[Future[WrittenFile]] = [pool.submit(self._write, file) for file in files]
        pool.shutdown(wait=False)  # the threads end with the last file

    @property
    def is_running(self) -> bool:
        return not all(future.done() for future in self._futures)

    @property
    def error(self) -> BaseException | None:
        """What stopped the first file that could not be written, so far."""
        errors = (future.exception() for future in self._futures if future.done())
        return next((error for error in errors if error is not None), None)

    def results(self) -> list[WrittenFile]:
        """The files; waits for them, and raises what stopped one."""
        return [future.result() for future in self._futures]

    def secure(self, copies: HostCopies) -> None:
        """Copy what is not written yet, because training is about to change it."""
        for file in self._changing:
            for _, value in [*file.items]:
                if isinstance(value, HeldTensor):
                    value.secure(copies)
        self._changing = []

    def cancel(self) -> None:
        """End the threads at their next tensor, and wait for that; the files are then worth nothing."""
        self._cancelled.set()
        for future in self._futures:
            future.exception()

    def _write(self, file: PlannedFile) -> WrittenFile:
        results = []
        with HashedFile(file.path, start_disk=True) as stream:
            while file.items:
                if self._cancelled.is_set():
                    raise CancelledError
                item, value = file.items[0]
                results.append(_write_value(stream, item, value, file.path.name))
                del file.items[0]  # its memory is free now
            stream.sync()
            return WrittenFile(file.path, results, stream.entry())


def _write_value(
    stream: HashedFile, item: WriteItem, value: HeldTensor | io.BytesIO, key: str
) -> WriteResult:
    begin = stream.size
    if isinstance(value, HeldTensor):
        before, after = archive_around(value.dtype, value.shape)
        stream.write(before)
        for block in value.blocks():
            stream.write(block)
        stream.write(after)
    else:
        stream.write(value.getbuffer())
    length = stream.size - begin
    return WriteResult(item.index, length, _StorageInfo(key, begin, length))


# --- reading ------------------------------------------------------------------------------------------


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fill a sharded state dict from any layout's files (collective over all ranks).

    Raises:
        DamagedCheckpoint: a file cannot be read.
        UntrustedCheckpoint: a file holds what might run code.
        InputError: tensors are missing or have other shapes.
    """
    try:
        read_index(directory)
        read_common(directory)
        refusal = None
    except InputError as error:
        refusal = error
    # megatron reads these on each rank by itself: one that cannot must not leave the others waiting
    if refusals := [each for each in gather(refusal) if each]:
        raise refusals[0]
    try:
        return dist_checkpointing.load(state, str(directory), common_strategy=RestrictedCommon())
    except BaseException as error:  # megatron's CheckpointException is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise _reason(error, directory) from error


def _reason(error: BaseException, directory: Path) -> InputError:
    """What a failed load tells the user; torch hands over the errors of all ranks in one of its own."""
    failures = getattr(error, "failures", {})
    for cause in [pair[0] for pair in failures.values()] or [error]:
        if isinstance(cause, InputError):
            return cause
        if isinstance(cause, OSError):
            path = cause.filename or directory
            return DamagedCheckpoint(f"{path}: cannot be read ({cause.strerror}); use another checkpoint")
    return InputError(
        f"{directory}: does not hold what this recipe's model needs ({_first_line(error)}); check that "
        "the recipe's model section is the one of the checkpoint"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def tensors_of(index: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors in a directory, optimizer state included."""
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def saved_tensors(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the model's tensors in the files (optimizer state left out)."""
    found = tensors_of(read_index(directory))
    return {name: value for name, value in found.items() if not name.startswith("optimizer.")}
