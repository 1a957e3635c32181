"""The files of weights in a source: safetensors, or what torch.save has written.

Nothing in them is trusted: a header may lie about sizes, an index may name other files, a pickle may hold
code. What does not add up is an InputError before any tensor is read, and nothing is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamm.convert.engine import FLOAT_NAMES, read_json
from megamm.convert.rules import Shape, listed
from megamm.engine.mapped_files import Extent, MappedFile, UntrustedPickle, unpickled_extents
from megamm.errors import InputError

_DTYPES = {
    **{name: dtype for dtype, name in FLOAT_NAMES.items()},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_PICKLES = (".bin", ".pt", ".pth")
# What is taken from a directory that holds more: training scripts leave optimizers and options beside it.
_STEMS = (
    ("model", ".safetensors"),
    ("pytorch_model", ".bin"),
    ("adapter_model", ".safetensors"),
    ("adapter_model", ".bin"),
)
# Where training scripts put the weights within what they save.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


class SourceFiles:
    """The tensors of a Hugging Face model directory, whole or in shards, or of one file.

    Raises:
        InputError: there are no weights, a file is missing or damaged or holds more than tensors, or index
            and shards differ.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, MappedFile] = {}
        self._where: dict[str, tuple[str, Extent]] = {}
        directory, names, index = _file_names(path)
        for name in names:
            self._files[name], extents = _open(directory / name)
            for key, extent in extents.items():
                if key in self._where:
                    raise InputError(f"{path}: {key} is in {self._where[key][0]} and in {name}; keep one")
                self._where[key] = name, extent
        if index is not None:
            self._check_index(directory / index)

    def _check_index(self, path: Path) -> None:
        weight_map = read_json(path)["weight_map"]
        found = {key: name for key, (name, _) in self._where.items()}
        wrong = {key for key, name in weight_map.items() if found.get(key) != name}
        wrong |= set(found) - set(weight_map)
        if wrong:
            raise InputError(f"{path}: disagrees with the shards about {listed(wrong)}; fetch both again")

    def keys(self) -> list[str]:
        return list(self._where)

    def shape(self, key: str) -> Shape:
        return self._where[key][1].shape

    def dtype(self, key: str) -> torch.dtype:
        name, extent = self._where[key]
        if extent.dtype not in FLOAT_NAMES:
            raise InputError(
                f"{self._files[name].path}: {key} has type {str(extent.dtype).removeprefix('torch.')};"
                " convert a checkpoint in F32, F16 or BF16"
            )
        return extent.dtype

    def tensor(self, key: str) -> Tensor:
        """A view of the file; do not change it."""
        name, extent = self._where[key]
        return self._files[name].tensor(extent)


def _file_names(path: Path) -> tuple[Path, list[str], str | None]:
    """(directory, names of the files of weights, name of their index)."""
    if path.is_file():
        return path.parent, [path.name], None
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; name a Hugging Face model directory")
    for stem, suffix in _STEMS:
        if (path / f"{stem}{suffix}").exists():
            return path, [f"{stem}{suffix}"], None
        index = f"{stem}{suffix}.index.json"
        if (path / index).exists():
            return path, _shard_names(path, index, suffix), index
    suffixes = (".safetensors", *_PICKLES)
    others = sorted(file.name for file in path.iterdir() if file.suffix in suffixes)
    if len(others) > 1:
        raise InputError(f"{path}: several files of weights ({listed(others)}); name the one meant instead")
    if not others:
        raise InputError(
            f"{path}: holds neither model.safetensors nor model.safetensors.index.json; name a Hugging Face"
            " model directory"
        )
    return path, others, None


def _shard_names(directory: Path, index: str, suffix: str) -> list[str]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{directory / index}: has no weight_map; fetch the file again")
    names = list(weight_map.values())
    for name in names:
        # A shard lies beside its index; anything else would let the index read elsewhere.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise InputError(f"{directory / index}: {name!r} is no shard file name; fetch the file again")
    missing = {name for name in names if not (directory / name).is_file()}
    if missing:
        raise InputError(f"{directory}: shard(s) missing: {listed(missing)}; fetch them again")
    return sorted(set(names))


def _open(path: Path) -> tuple[MappedFile, dict[str, Extent]]:
    try:
        file = MappedFile(path)
        extents = safetensors_extents(file) if path.suffix == ".safetensors" else _pickled_extents(file)
        for extent in extents.values():
            file.tensor(extent)  # finds extents that reach beyond the file
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); fetch the file again") from None
    except UntrustedPickle as error:
        raise InputError(
            f"{path}: {error}; if you trust it, convert it to safetensors: safetensors.torch.save_file("
            f"torch.load({path.name!r}, weights_only=False), 'model.safetensors')"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{path}: damaged or cut short ({error}); fetch the file again") from None
    return file, extents


# --- safetensors --------------------------------------------------------------------------------------


def safetensors_extents(file: MappedFile) -> dict[str, Extent]:
    """Where the tensors of a safetensors file lie: length of the header, header (JSON), numbers without gaps.

    Raises:
        ValueError: the header is damaged, or says what the file is not.
    """
    length = int.from_bytes(file.read(0, 8), "little")
    if file.size < 8 or length > min(_MAX_HEADER, file.size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file.size}")
    try:
        header = json.loads(file.read(8, length).decode("utf-8"), object_pairs_hook=_unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError("the header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    header.pop("__metadata__", None)
    begin = 8 + length
    extents = {key: _extent(key, entry, begin) for key, entry in header.items()}
    end = begin
    for key, extent in sorted(extents.items(), key=lambda item: (item[1].offset, item[1].end)):
        if extent.offset != end:
            raise ValueError(f"{key} begins at byte {extent.offset}, but the tensor before it ends at {end}")
        end = extent.end
    if end != file.size:
        raise ValueError(f"the tensors end at byte {end} of {file.size}")
    return extents


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the header names a tensor twice")
    return found


def _extent(key: str, entry: Any, begin: int) -> Extent:
    fields = entry if isinstance(entry, dict) else {}
    name, shape, span = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if shape is None or span is None or len(span) != 2:
        raise ValueError(f"the header says nothing sensible about {key}")
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"{key} is of the unknown type {name}")
    num_bytes = prod(shape) * _DTYPES[name].itemsize
    if span[1] - span[0] != num_bytes:
        raise ValueError(f"{key} has {num_bytes} bytes by its shape, {span[1] - span[0]} by its offsets")
    stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return Extent(begin + span[0], _DTYPES[name], tuple(shape), stride)


def _counts(value: Any) -> list[int] | None:
    """The value if it is a list of counts."""
    fits = isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
    return value if fits else None


# --- pickles ------------------------------------------------------------------------------------------


def _pickled_extents(file: MappedFile) -> dict[str, Extent]:
    content = unpickled_extents(file, 0, file.size)
    while isinstance(content, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if wrapper is None:
            return dict(_flat(content, ""))
        content = content[wrapper]
    raise ValueError("holds no dictionary of tensors")


def _flat(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Extent]]:
    """Tensors by name; anything else (a step, a learning rate) is no weight."""
    for key, value in content.items():
        if isinstance(value, Extent):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
