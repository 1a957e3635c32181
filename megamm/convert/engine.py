"""Applying a table of rules, one tensor at a time, without ever holding a model in memory."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megamm.convert.family import TensorFiles
from megamm.convert.rules import Rule, Shape, Table, listed
from megamm.engine.hashed_file import write_at
from megamm.engine.mapped_files import MappedFile, blocks, give_back, unpickled_extents
from megamm.engine.weight_files import THREADS, StreamedTensor, results
from megamm.errors import InputError, RunError
from megamm.whole_files import read_whole

MAX_SHARD_BYTES = 5 * 1000**3
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file is not there, cannot be read, or does not hold a JSON object.
    """
    try:
        value = json.loads(read_whole(path).decode("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; name a complete Hugging Face model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: not readable as JSON ({reason}); fetch the file again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; fetch the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object the way Hugging Face libraries do (two spaces, sorted keys)."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


class OurTensors(Mapping[str, Tensor]):
    """Our tensors, each computed from a source when it is asked for.

    Attributes:
        skipped: keys of the source that have no place in ours -> reason.

    Raises:
        InputError: keys are missing or unknown, or a shape is not what the configuration says.
    """

    def __init__(self, table: Table, source: TensorFiles, where: str) -> None:
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

    def dtype(self, key: str) -> torch.dtype:
        return self._source.dtype(self._names[self._rules[key].theirs[0]])

    def streamed(self, key: str) -> StreamedTensor:
        """The tensor for writing: not made before it is written, nor copied where only rows move."""
        rule = self._rules[key]
        names = [self._names[name] for name in rule.theirs]

        def pieces() -> list[Tensor]:
            tensors = [self._source.tensor(name) for name in names]
            found = rule.our_pieces(tensors)
            for tensor in tensors:  # if it was copied; of a view, nothing was looked at yet
                give_back(tensor)
            return found

        return StreamedTensor(key, self.dtype(key), rule.our_shape(), pieces)


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
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What `export_tensors` wrote: the types of our tensors, and how much there is of theirs."""

    dtypes: dict[str, torch.dtype]
    num_tensors: int
    num_bytes: int


class OurSource(Protocol):
    """Our tensors by name, read when asked for (`WeightFiles`)."""

    def __iter__(self) -> Iterator[str]: ...

    def __getitem__(self, name: str, /) -> Tensor: ...

    def shape(self, name: str) -> Shape: ...

    def dtype(self, name: str) -> torch.dtype: ...


class InMemory:
    """Tensors that are there already, as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str, /) -> Tensor:
        return self._tensors[name]

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


def export_tensors(
    tensors: OurSource,
    names: Iterable[str],
    table: Table,
    out: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    only_file: str | None = None,
) -> Written:
    """Write our tensors in their format into the directory `out`.

    One file, or shards of at most `max_shard_bytes` (a larger tensor has one for itself) and an index.

    Args:
        names: of the tensors that have to go into it, neither more nor less than the table says.
        only_file: the name of the one file, where the format has no shards.

    Raises:
        InputError: our keys, shapes or types are not those of the table.
        RunError: writing failed (disk full, ...).
    """
    entries = _plan(tensors, names, table)
    size = sum(entry.num_bytes for entry in entries) if only_file else max_shard_bytes
    shards = _into_shards(entries, size)
    paths = [out / (only_file or _shard_name(index, len(shards))) for index in range(len(shards))]
    num_bytes = sum(entry.num_bytes for entry in entries)
    try:
        for path, shard in zip(paths, shards, strict=True):
            _write_shard(path, shard, tensors)
        if len(shards) > 1:
            weight_map = {
                entry.key: path.name for path, shard in zip(paths, shards, strict=True) for entry in shard
            }
            write_json(out / INDEX_NAME, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    except OSError as error:
        raise RunError(
            f"{out}: writing the weights failed ({error}); free space or choose another --out"
        ) from None
    return Written({entry.rule.ours: entry.dtype for entry in entries}, len(entries), num_bytes)


def _plan(tensors: OurSource, names: Iterable[str], table: Table) -> list[_Entry]:
    """Everything that will be written, in the order of the table; checks keys, shapes and types."""
    table.account_ours(names, "checkpoint")
    entries = []
    for rule in table.rules:
        found, dtype = tensors.shape(rule.ours), tensors.dtype(rule.ours)
        if not rule.accepts(found):
            _check_shape(rule.ours, found, rule.our_shape(), "checkpoint")
        if dtype not in FLOAT_NAMES:
            raise InputError(f"checkpoint: {rule.ours} has type {dtype}; only float types are exported")
        for part, (key, shape) in enumerate(zip(rule.theirs, rule.their_shapes(), strict=True)):
            entries.append(_Entry(key, dtype, shape, rule, part))
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


def _write_shard(path: Path, entries: list[_Entry], tensors: OurSource) -> None:
    """The safetensors format: length of the header, header (JSON, padded to 8 bytes), raw numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = [], 0
    for entry in entries:
        offsets.append(end)
        end += entry.num_bytes
        header[entry.key] = {
            "dtype": FLOAT_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offsets[-1], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    path.write_bytes(head)
    _fill(path, entries, [len(head) + offset for offset in offsets], tensors)


def export_pickle(tensors: OurSource, names: Iterable[str], table: Table, path: Path) -> Written:
    """Write our tensors in their format as one file of torch.save, a dictionary of tensors.

    Raises:
        InputError: our keys, shapes or types are not those of the table.
        RunError: writing failed (disk full, ...).
    """
    entries = _plan(tensors, names, table)
    try:
        with torch.serialization.skip_data():  # a file with holes; the memory of `empty` is never touched
            torch.save({entry.key: torch.empty(entry.shape, dtype=entry.dtype) for entry in entries}, path)
        file = MappedFile(path)
        extents = unpickled_extents(file, 0, file.size)
        _fill(path, entries, [extents[entry.key].offset for entry in entries], tensors)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error}); free space or choose another --out") from None
    num_bytes = sum(entry.num_bytes for entry in entries)
    return Written({entry.rule.ours: entry.dtype for entry in entries}, len(entries), num_bytes)


def _fill(path: Path, entries: list[_Entry], offsets: list[int], tensors: OurSource) -> None:
    """Write the numbers of all entries to their places in a file; all that one of ours becomes at a time."""
    by_rule: dict[str, list[tuple[_Entry, int]]] = {}
    for entry, offset in zip(entries, offsets, strict=True):
        by_rule.setdefault(entry.rule.ours, []).append((entry, offset))
    with path.open("r+b", buffering=0) as file, ThreadPoolExecutor(THREADS, "convert") as pool:
        jobs = [pool.submit(_write_parts, file.fileno(), places, tensors) for places in by_rule.values()]
        results(jobs)


def _write_parts(file: int, places: list[tuple[_Entry, int]], tensors: OurSource) -> None:
    """Write what one of our tensors becomes, each part to its place in the file."""
    rule = places[0][0].rule
    tensor = tensors[rule.ours].detach().cpu()
    parts = rule.their_pieces(tensor)
    give_back(tensor)  # if it was copied; of a view, nothing was looked at yet
    for entry, offset in places:
        for piece in parts[entry.part]:
            for block in blocks(piece):
                write_at(file, block, offset)
                offset += len(block)


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
