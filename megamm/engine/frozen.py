"""Frozen weights, which a run stores once: its next checkpoints hold hard links to the same files.

Every checkpoint is whole by itself: it can be copied, verified and loaded alone, and deleting another takes
nothing from it. Files are only taken over from a checkpoint that this process wrote or loaded, with the
frozen weights that it has now; what else lies in the directory is never trusted to hold the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megamm.engine.manifest import FileEntry
from megamm.engine.ranks import describe, gather
from megamm.engine.restricted import FROZEN as DIRECTORY
from megamm.engine.restricted import read_index
from megamm.engine.sharded_files import tensors_of

Stamps = dict[str, tuple[int, int]]  # name -> address and version of this rank's parameter


@dataclass(frozen=True)
class FrozenWeights:
    """The frozen weights of the model in this layout.

    Attributes:
        dtypes: name -> dtype, of the whole model.
        stamps: of this rank's; they change with any in-place change of a weight.
    """

    dtypes: dict[str, torch.dtype]
    stamps: Stamps


@dataclass(frozen=True)
class FrozenFiles:
    """A checkpoint's files of frozen weights, and whose content they have.

    Attributes:
        checkpoint: where they lie.
        files: path below the checkpoint -> size and hash.
        weights: the model's that were written there or loaded from there.
    """

    checkpoint: Path
    files: dict[str, FileEntry]
    weights: FrozenWeights


def find_frozen(model_state: dict[str, Any]) -> FrozenWeights:
    """The parameters that no rank trains (collective).

    Args:
        model_state: sharded state dict of this rank's chunks.
    """
    dtypes: dict[str, torch.dtype] = {}
    stamps: Stamps = {}
    trained: set[str] = set()
    for name, entry in _entries(model_state):
        # a tensor that is no parameter is state of a module, and may change
        if isinstance(entry.data, torch.nn.Parameter) and not entry.data.requires_grad:
            dtypes[name] = entry.data.dtype
            stamps[name] = (entry.data.data_ptr(), entry.data._version)
        else:
            trained.add(name)
    parts = gather((dtypes, trained))
    everywhere = {name: dtype for part, _ in parts for name, dtype in part.items()}
    trained = {name for _, part in parts for name in part}  # a tied weight lies on two stages
    frozen = {name: dtype for name, dtype in everywhere.items() if name not in trained}
    return FrozenWeights(frozen, {name: stamp for name, stamp in stamps.items() if name in frozen})


def take_frozen(model_state: dict[str, Any], weights: FrozenWeights) -> dict[str, Any]:
    """Move the frozen entries out of a sharded state dict, into one of their own."""
    taken = {}
    for chunk, entries in model_state.items():
        for name, entry in _entries({chunk: entries}):
            if name in weights.dtypes:
                taken[f"{chunk}.{name}"] = entry
        own = {id(entry) for entry in taken.values()}
        model_state[chunk] = {key: entry for key, entry in entries.items() if id(entry) not in own}
    return taken


def _entries(model_state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for entry in nested_values(model_state):
        if isinstance(entry, ShardedTensor):
            yield entry.key, entry
        elif isinstance(entry, ShardedTensorFactory):  # one parameter, saved as several shards of one tensor
            yield next(iter(nested_values(entry.build()))).key, entry


def loaded_files(checkpoint: Path, files: dict[str, FileEntry], weights: FrozenWeights) -> FrozenFiles | None:
    """The frozen files of a checkpoint that the model has just been loaded from.

    Args:
        checkpoint: verified.
        files: all of its files.
        weights: frozen ones of the model, after loading.
    Returns:
        None if the checkpoint has other frozen weights, or has them in another precision.
    """
    own = {name: entry for name, entry in files.items() if name.startswith(f"{DIRECTORY}/")}
    if not own:
        return None
    found = {name: dtype for name, (_, dtype) in tensors_of(read_index(checkpoint / DIRECTORY)).items()}
    return FrozenFiles(checkpoint, own, weights) if found == weights.dtypes else None


def hold_the_same(files: FrozenFiles | None, weights: FrozenWeights) -> bool:
    """Whether files hold the weights that the model has now; all ranks come to the same answer."""
    return all(gather(files is not None and files.weights == weights))


def link(files: FrozenFiles, target: Path) -> str | None:
    """Give a new checkpoint hard links to files of an earlier one (rank 0 alone).

    Returns:
        None, or why it could not be done; nothing is then left in `target`.
    """
    try:
        (target / DIRECTORY).mkdir()
        for name, entry in files.files.items():
            if (files.checkpoint / name).stat().st_size != entry.size:
                raise OSError(f"{files.checkpoint / name} was changed")
            os.link(files.checkpoint / name, target / name)
    except OSError as error:
        shutil.rmtree(target / DIRECTORY, ignore_errors=True)
        return describe(error)
    return None
