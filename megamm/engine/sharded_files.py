"""Distributed checkpoint files (torch_dist format) through megatron-core, written without extra processes.

megatron's writer starts a multiprocessing Manager and forks a process per file, also for synchronous
saves: seconds per save, and an orphan when a rank is killed. Threads write the same bytes.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megamm.engine.cpu import replace_symbol
from megamm.errors import InputError


def save_sharded(state: dict[str, Any], directory: Path, content_metadata: dict[str, Any]) -> None:
    """Write a sharded state dict (collective over all ranks); `directory` must exist and be empty."""
    _write_in_threads()
    dist_checkpointing.save(state, str(directory), content_metadata=content_metadata)


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fill a sharded state dict from any layout's files (collective over all ranks).

    Raises:
        InputError: tensors are missing or have other shapes.
    """
    try:
        return dist_checkpointing.load(state, str(directory))
    except BaseException as error:  # megatron's CheckpointException is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(
            f"{directory}: does not hold what this recipe's model needs ({_first_line(error)}); check that "
            "the recipe's model section is the one of the checkpoint"
        ) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def saved_tensors(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the model's tensors in the files (optimizer state left out)."""
    metadata = dcp.FileSystemReader(str(directory)).read_metadata()
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }


def read_tensors(directory: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors of the model by name, read in one process without a process group."""
    available = saved_tensors(directory)
    wanted = {
        name: torch.empty(*available[name][:1], dtype=available[name][1]) for name in names or available
    }
    dcp.load(wanted, storage_reader=dcp.FileSystemReader(str(directory)), no_dist=True)
    return wanted


def write_tensors(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write whole tensors so that every layout can load them; needs a process group of one."""
    state = {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}
    save_sharded({"model": state}, directory, content_metadata={})


def _write_in_threads() -> None:
    replace_symbol(filesystem_async, "_get_write_results_queue", queue.Queue)
    writer = filesystem_async.FileSystemWriterAsync
    replace_symbol(writer, "write_preloaded_data_multiproc", staticmethod(_write_buckets))


def _write_buckets(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Write each bucket (one file) in a thread; same contract as the method it replaces."""
    written: queue.Queue[Any] = queue.Queue()
    threads = []
    for i, bucket in enumerate(buckets):
        pending: queue.Queue[Any] = queue.Queue()
        pending.put(i)  # the writer takes it out to say that it is done
        arguments = {
            "local_proc_idx": i,
            "write_bucket": bucket,
            "results_queue": written,
            "count_queue": pending,
            "use_fsync": True,
        }
        write = filesystem_async.FileSystemWriterAsync.write_preloaded_data
        threads.append(threading.Thread(target=write, args=(transforms,), kwargs=arguments))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcome = dict(written.get() for _ in buckets)
    failed = next((value for value in outcome.values() if isinstance(value, Exception)), None)
    results.put(failed or outcome)
