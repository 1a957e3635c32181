"""Applying a table of rules, one tensor at a time: reading and writing safetensors without ever
holding a model in memory.

Files are read through safetensors only, which cannot run code; files that can (pickles) are refused.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamm.convert.rules import Rule, Shape, Table, listed
from megamm.errors import InputError, RunError

MAX_SHARD_BYTES = 5 * 1000**3
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is not there, cannot be read, or does not hold a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a complete Hugging Face model directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; fetch the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object the way Hugging Face libraries do (two spaces, sorted keys)."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


class SafetensorsDirectory:
    """The tensors of a Hugging Face model directory, whole or in shards, opened for reading.

    All headers are checked when it is made: a damaged or missing file is found before any conversion.

    Raises:
        InputError: there are no safetensors, a shard is missing or damaged, or index and shards differ.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = {name: _open(directory / name) for name in _shard_names(directory)}
        self._where: dict[str, str] = {}
        for name, handle in self._files.items():
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if key in self._where:
                    raise InputError(f"{directory}: {key} is in {self._where[key]} and in {name}; keep one")
                self._where[key] = name
        self._check_index()

    def _check_index(self) -> None:
        path = self.directory / INDEX_NAME
        if SINGLE_NAME in self._files or not path.exists():
            return
        weight_map = read_json(path)["weight_map"]
        wrong = {key for key, name in weight_map.items() if self._where.get(key) != name}
        wrong |= set(self._where) - set(weight_map)
        if wrong:
            raise InputError(f"{path}: disagrees with the shards about {listed(wrong)}; fetch both again")

    def keys(self) -> list[str]:
        return list(self._where)

    def shape(self, key: str) -> Shape:
        return tuple(self._slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._slice(key).get_dtype()
        if name not in _DTYPES:
            raise InputError(
                f"{self.directory / self._where[key]}: {key} has type {name};"
                " convert a checkpoint in F32, F16 or BF16"
            )
        return _DTYPES[name]

    def tensor(self, key: str) -> Tensor:
        try:
            return self._files[self._where[key]].get_tensor(key)
        except (SafetensorError, RuntimeError) as error:
            path = self.directory / self._where[key]
            raise InputError(f"{path}: {key} cannot be read ({error}); fetch the file again") from None

    def _slice(self, key: str) -> Any:
        return self._files[self._where[key]].get_slice(key)


def _shard_names(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; name a Hugging Face model directory")
    if (directory / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    if not (directory / INDEX_NAME).exists():
        raise InputError(_no_safetensors(directory))
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{directory / INDEX_NAME}: has no weight_map; fetch the file again")
    names = set(weight_map.values())
    for name in names:
        # A shard lies beside its index; anything else would let the index read elsewhere.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(
                f"{directory / INDEX_NAME}: {name!r} is no shard file name; fetch the file again"
            )
    missing = {name for name in names if not (directory / name).is_file()}
    if missing:
        raise InputError(f"{directory}: shard(s) missing: {listed(missing)}; fetch them again")
    return sorted(names)


def _no_safetensors(directory: Path) -> str:
    pickles = [
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))
    ]
    if pickles:
        return (
            f"{directory / pickles[0]}: is a pickle, which may run code when it is read; if you trust it,"
            " load the model with transformers and write it again with save_pretrained, then convert that"
        )
    return f"{directory}: holds neither {SINGLE_NAME} nor {INDEX_NAME}; name a Hugging Face model directory"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: damaged or cut short ({error}); fetch the file again") from None


class OurTensors(Mapping[str, Tensor]):
    """Our tensors, each computed from a source when it is asked for.

    Attributes:
        skipped: keys of the source that have no place in ours -> reason.

    Raises:
        InputError: keys are missing or unknown, or a shape is not what the configuration says.
    """

    def __init__(self, table: Table, source: SafetensorsDirectory) -> None:
        where = str(source.directory)
        self._source = source
        self._names = table.canonical_keys(source.keys(), where)
        self.skipped = table.account(self._names, where)
        self._rules = {rule.ours: rule for rule in table.rules}
        for rule in table.rules:
            for key, shape in zip(rule.theirs, rule.their_shapes(), strict=True):
                _check_shape(self._names[key], source.shape(self._names[key]), shape, where)
            if len({source.dtype(self._names[key]) for key in rule.theirs}) > 1:
                raise InputError(f"{where}: {listed(rule.theirs)} differ in type; store them in one type")

    def __getitem__(self, key: str) -> Tensor:
        rule = self._rules[key]
        return rule.to_ours([self._source.tensor(self._names[name]) for name in rule.theirs])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


def _check_shape(key: str, found: Shape, wanted: Shape, where: str) -> None:
    if found != wanted:
        raise InputError(
            f"{where}: {key} has shape {list(found)}, but the configuration says {list(wanted)};"
            " use the configuration that belongs to these weights"
        )


@dataclass(frozen=True)
class _Entry:
    """One tensor to write: its name, type, shape, and the rule and part that yield it."""

    key: str
    dtype: torch.dtype
    shape: Shape
    rule: Rule
    part: int

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What `export_tensors` wrote: the types of our tensors, and how much there is of theirs."""

    dtypes: dict[str, torch.dtype]
    num_tensors: int
    num_bytes: int


def export_tensors(
    tensors: Mapping[str, Tensor], table: Table, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Written:
    """Write our tensors in their format into the directory `out`.

    One file, or shards of at most `max_shard_bytes` (a larger tensor has one for itself) and an index.

    Raises:
        InputError: our keys, shapes or types are not those of the table.
        RunError: writing failed (disk full, ...).
    """
    entries = _plan(tensors, table)
    shards = _into_shards(entries, max_shard_bytes)
    names = [_shard_name(index, len(shards)) for index in range(len(shards))]
    num_bytes = sum(entry.num_bytes for entry in entries)
    try:
        for name, shard in zip(names, shards, strict=True):
            _write_shard(out / name, shard, tensors)
        if len(shards) > 1:
            weight_map = {
                entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard
            }
            write_json(out / INDEX_NAME, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    except OSError as error:
        raise RunError(
            f"{out}: writing the weights failed ({error}); free space or choose another --out"
        ) from None
    return Written({entry.rule.ours: entry.dtype for entry in entries}, len(entries), num_bytes)


def _plan(tensors: Mapping[str, Tensor], table: Table) -> list[_Entry]:
    """Everything that will be written, in the order of the table; checks keys, shapes and types."""
    table.account_ours(tensors, "checkpoint")
    entries = []
    for rule in table.rules:
        tensor = tensors[rule.ours]
        if not rule.accepts(tuple(tensor.shape)):
            _check_shape(rule.ours, tuple(tensor.shape), rule.our_shape(), "checkpoint")
        if tensor.dtype not in _DTYPE_NAMES:
            raise InputError(
                f"checkpoint: {rule.ours} has type {tensor.dtype}; only float types are exported"
            )
        for part, (key, shape) in enumerate(zip(rule.theirs, rule.their_shapes(), strict=True)):
            entries.append(_Entry(key, tensor.dtype, shape, rule, part))
    return entries


def _shard_name(index: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _into_shards(entries: list[_Entry], max_bytes: int) -> list[list[_Entry]]:
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    # Wide types first: a reader that maps the file cannot view a number that is not aligned.
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _write_shard(path: Path, entries: list[_Entry], tensors: Mapping[str, Tensor]) -> None:
    """The safetensors format: length of the header, header (JSON, padded to 8 bytes), raw numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        span = [offset, offset + entry.num_bytes]
        header[entry.key] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": span,
        }
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in _parts(entries, tensors):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _parts(entries: Iterable[_Entry], tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    rule: Rule | None = None
    parts: list[Tensor] = []
    for entry in entries:
        if entry.rule is not rule:  # the parts of one tensor follow each other
            rule = entry.rule
            parts = rule.to_theirs(tensors[rule.ours].detach().cpu())
        flat = parts[entry.part].contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data  # a view: nothing is copied


def check_new(out: Path) -> None:
    """Raises InputError unless `out` is free or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: already exists; name a new directory")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends well, else vanishes.

    Raises:
        InputError: `out` exists and is not an empty directory, or cannot be made.
    """
    out = Path(os.path.abspath(out))
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); choose another --out") from None
    try:
        # mkdtemp gives the directory to its owner alone; the result gets the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        yield temporary
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
