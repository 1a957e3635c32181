"""Reading checkpoints without running what they hold.

torch reads the index of a distributed checkpoint (`.metadata`) and the objects in its files by plain pickle,
which calls whatever a file names; a manifest does not help, as who writes the files writes the manifest too.
Here an index may be made of the dataclasses that torch defines for it, of sizes, types and layouts, and
everything else is loaded with weights_only. megatron-core reads through these classes as well: the names
under which it knows torch's are replaced when this module is imported.
"""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megamm.engine.cpu import replace_symbol
from megamm.engine.manifest import DamagedCheckpoint, UntrustedCheckpoint
from megamm.engine.mapped_files import Extent, UntrustedPickle, unpickled_extents
from megamm.engine.reading import OpenFile

INDEX, COMMON = ".metadata", "common.pt"
FROZEN = "frozen"  # the one directory beside its own whose files an index may name
_REMEDY = (
    "no checkpoint of megamm needs it, and it might run code; save the checkpoint again on a machine that you"
    " trust, or take its weights as safetensors and `megamm convert import` them"
)
_FILE = re.compile(rf"(\.\./{FROZEN}/)?[\w.-]*\w")  # as an index names them: beside it, or in FROZEN
_MODULES = {module.__name__: module for module in (dcp_metadata, filesystem, planner)}


def untrusted(path: Path, error: Exception) -> UntrustedCheckpoint:
    """The error of a file that holds what an unpickler has refused."""
    path = Path(os.path.normpath(path))  # an index says "../frozen"
    name = re.search(r"(?:GLOBAL|holds) ([\w.]+)", str(error))
    what = name[1] if name else (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UntrustedCheckpoint(f"{path}: holds {what}; {_REMEDY}")


# --- the index ------------------------------------------------------------------------------------------


class _IndexUnpickler(pickle.Unpickler):
    """Finds nothing but what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module in ("pathlib", "pathlib._local") and name == "PosixPath":  # where torch wrote it
            return PosixPath
        if module == "torch":
            found = vars(torch).get(name)
            if isinstance(found, torch.dtype) or found in (torch.Size, torch.device):
                return found
        if module in _MODULES:
            found = vars(_MODULES[module]).get(name)
            is_data = isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum))
            if is_data and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def read_index(directory: Path) -> Metadata:
    """The index of a directory of sharded files.

    Raises:
        DamagedCheckpoint: it cannot be read.
        UntrustedCheckpoint: it is no plain index.
    """
    path = Path(directory) / INDEX
    # an unpickler can set attributes of the classes that it may find
    before = [(found, dict(vars(found))) for found in _index_classes()]
    try:
        index = _IndexUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error.strerror}); use another checkpoint"
        ) from None
    except Exception as error:  # damaged pickles raise almost anything
        raise untrusted(path, error) from None
    finally:
        changed = [_restore(found, attributes) for found, attributes in before]
    if any(changed) or not _is_index(index):
        raise UntrustedCheckpoint(f"{path}: holds something else than an index; {_REMEDY}")
    _check_places(path, index)
    return index


def _index_classes() -> list[type]:
    found = [value for module in _MODULES.values() for value in vars(module).values()]
    return [value for value in found if isinstance(value, type) and is_dataclass(value)]


def _restore(changed: type, attributes: dict[str, Any]) -> bool:
    """Give a class the attributes it had; whether it had others."""
    now = dict(vars(changed))
    wrong = [name for name in now.keys() | attributes.keys() if now.get(name) is not attributes.get(name)]
    for name in wrong:
        if name in attributes:
            setattr(changed, name, attributes[name])
        else:
            delattr(changed, name)
    return bool(wrong)


def _is_index(index: Any) -> bool:
    try:
        tensors, places = index.state_dict_metadata, index.storage_data
        return (
            type(index) is Metadata
            and type(tensors) is type(places) is dict
            and all(type(name) is str and _is_entry(entry) for name, entry in tensors.items())
            and all(type(place) is MetadataIndex for place in places)
        )
    except AttributeError:  # an object without what its class says
        return False


def _is_entry(entry: Any) -> bool:
    if type(entry) is not TensorStorageMetadata:
        return type(entry) is BytesStorageMetadata
    sizes = [entry.size, *(size for chunk in entry.chunks for size in (chunk.offsets, chunk.sizes))]
    return isinstance(entry.properties.dtype, torch.dtype) and all(type(size) is torch.Size for size in sizes)


def _check_places(path: Path, index: Metadata) -> None:
    """Raise UntrustedCheckpoint if the index takes tensors from files that are none of the checkpoint's."""
    for info in index.storage_data.values():
        name = getattr(info, "relative_path", None)
        if getattr(info, "transform_descriptors", None):
            raise UntrustedCheckpoint(f"{path}: has files that are packed in a way of their own; {_REMEDY}")
        numbers = [getattr(info, "offset", None), getattr(info, "length", None)]
        if type(name) is not str or not _FILE.fullmatch(name) or [type(n) for n in numbers] != [int, int]:
            raise UntrustedCheckpoint(f"{path}: names the file {str(name)[:100]!r}; {_REMEDY}")


class RestrictedReader(dcp.FileSystemReader):
    """torch's reader, for which no file of a checkpoint can run code."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self._index: Metadata | None = None

    def read_metadata(self) -> Metadata:  # type: ignore[override] # (without the files of single ranks)
        """The index, read once."""
        if self._index is None:
            self._index = read_index(Path(self.path))
        return self._index

    def read_data(self, plan: LoadPlan, planner: Any) -> Any:
        """Read tensors into their places; objects go to the planner, which is a `RestrictedPlanner`."""
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            path = Path(self.path) / name
            try:
                with OpenFile(path) as file:
                    for item in items:
                        self._read(file, item, planner)
            except (pickle.UnpicklingError, UntrustedPickle) as error:
                raise untrusted(path, error) from None
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _read(self, file: OpenFile, item: ReadItem, planner: Any) -> None:
        place = self.storage_data[item.storage_index]
        if item.type == LoadItemType.BYTE_IO:
            planner.load_bytes(item, io.BytesIO(file.read(place.offset, place.length)))
            return
        extent = unpickled_extents(file, place.offset, place.length)
        target = planner.resolve_tensor(item).detach()
        if not isinstance(extent, Extent) or target.size() != item.lengths:
            raise ValueError(f"{file.path}: holds no tensor where its index says")
        file.read_into(target, extent, item.storage_offsets, item.lengths)
        planner.commit_tensor(item, target)


# --- objects --------------------------------------------------------------------------------------------


class RestrictedPlanner(torch_dist.MCoreLoadPlanner):  # type: ignore[misc]
    """megatron-core's planner, with objects loaded by weights_only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take an object that is no tensor, such as the extra state of a module."""
        name = read_item.dest_index.fqn
        if not isinstance(self.state_dict[name], io.BytesIO):
            raise pickle.UnpicklingError(f"an object for the tensor {name}")
        loaded = torch.load(value, map_location="cpu", weights_only=True)
        _check_inner_pickles(loaded)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


def _check_inner_pickles(loaded: Any) -> None:
    """Transformer Engine keeps the scales of FP8 as a tensor of bytes, which it unpickles."""
    for value in loaded if isinstance(loaded, list) else [loaded]:
        if isinstance(value, torch.Tensor) and value.dtype is torch.uint8 and value.numel():
            _ExtraStateUnpickler(io.BytesIO(value.numpy().tobytes())).load()


class _ExtraStateUnpickler(pickle.Unpickler):
    """Finds tensors, and the dataclasses of Transformer Engine's FP8 recipes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_plain
        if module == "transformer_engine.common.recipe" and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (is_dataclass(found) or issubclass(found, Enum | tuple)):
                return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def _load_plain(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read_common(directory: Path) -> dict[str, Any]:
    """What lies in no shard, and is the same on all ranks.

    Raises:
        DamagedCheckpoint: it cannot be read.
        UntrustedCheckpoint: it holds more than tensors and plain containers.
    """
    path = Path(directory) / COMMON
    try:
        loaded = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error.strerror}); use another checkpoint"
        ) from None
    except Exception as error:  # torch raises almost anything for damaged files
        raise untrusted(path, error) from None
    if not isinstance(loaded, dict):
        raise UntrustedCheckpoint(f"{path}: holds a {type(loaded).__name__}; {_REMEDY}")
    return loaded


class RestrictedCommon(TorchCommonLoadStrategy):  # type: ignore[misc]
    """megatron-core's way to `read_common`."""

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return read_common(Path(checkpoint_dir))


def _reader(checkpoint_dir: Any, cache_metadata: bool = False) -> RestrictedReader:
    return RestrictedReader(checkpoint_dir)


replace_symbol(torch_dist, "_get_filesystem_reader", _reader)
replace_symbol(torch_dist, "MCoreLoadPlanner", RestrictedPlanner)
