#!/usr/bin/env python
"""What the manifest costs when checkpoints are saved and loaded, and how long training stands still.

    python tools/benchmark/checkpoint.py [--rounds 5] [--ranks 1 2] [--folder /tmp] [--json FILE]

A model with AdamW's state in fp32, 16 bytes per parameter, is saved and loaded by data-parallel ranks,
through the classes that training uses. "Raw" is the same code without hashes; it waits for the disk as well.
"As torch" is raw with torch's own writer and reader. Sides take turns, and every second turn in the other
order. Loading is measured from the page cache, where nothing hides what verifying costs, and from the disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import Aim, Result, Table, add_json, load, machine
from torch.distributed.checkpoint.filesystem import (
    SerializationFormat,
    _StorageWriterTransforms,
    _write_item,
)

from megamm.engine import groups, hashed_file, loading, sharded_files
from megamm.engine import manifest as manifests
from megamm.engine.checkpoint import Checkpoints, Progress
from megamm.engine.held_tensors import HeldTensor
from megamm.engine.manifest import FileEntry, list_checkpoints
from megamm.engine.optimizer import build_optimizer, wrap_data_parallel
from megamm.engine.restricted import RestrictedReader
from megamm.engine.weights import initialize
from megamm.models.initialization import weight_drawer
from megamm.models.vlm import build_model
from megamm.parity.processes import run_processes
from megamm.recipe import recipe_from_dict

LANGUAGE = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_heads": 12,
    "ffn_hidden_size": 2048,
    "vocab_size": 32000,
    "max_positions": 512,
}
VISION = {
    "image_size": 28,
    "patch_size": 14,
    "width": 64,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_width": 128,
}
SMALL = {"num_layers": 2, "vocab_size": 4000}
ASYNC = "save asynchronously"
STEP = 2.0  # seconds that training goes on for until its next update: short for a model of this size


class _NoHash:
    def update(self, data: object) -> None:
        pass

    def hexdigest(self) -> str:
        return ""


@contextmanager
def without_hashes() -> Iterator[None]:
    """Nothing is hashed, and no manifest written or read; the rest is the same."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(hashed_file, "xxh3_128", _NoHash))
        entry = lambda path, algorithm="": FileEntry(path.stat().st_size, "")  # noqa: E731
        stack.enter_context(mock.patch.object(manifests, "hash_file", entry))
        stack.enter_context(mock.patch.object(loading.manifests, "find_damage", lambda *args: []))
        yield


class Run:
    """One rank's model, and the checkpoints that it saves."""

    def __init__(self, folder: Path, asynchronous: bool, small: bool) -> None:
        raw = {
            "name": "benchmark",
            "run_dir": "unused",
            "tokenizer": "unused",
            "model": {
                "assembly": "merged",
                "connector": {"kind": "mlp"},
                "language": {**LANGUAGE, **(SMALL if small else {})},
                "vision": VISION,
            },
            "data": {"sequence_length": 64},
            "training": {"global_batch_size": dist_size(), "micro_batch_size": 1, "precision": "fp32"},
            "checkpoint": {"keep": 1, "asynchronous": asynchronous},
        }
        self.recipe = recipe_from_dict(raw)
        self.layout = groups.initialize(self.recipe.parallel, torch.device("cpu"), "gloo")
        self.models = build_model(self.recipe, self.layout, "local", 3)
        initialize(self.models, weight_drawer(self.recipe.model, 1))
        wrapped = wrap_data_parallel(self.models, self.recipe, self.layout)
        self.optimizer = build_optimizer(wrapped, self.recipe, self.layout)
        for model in wrapped:
            for buffer in model.buffers:
                buffer.grad_data.normal_(generator=torch.Generator().manual_seed(2))
        self.optimizer.step()
        self.num_parameters = sum(p.numel() for model in self.models for p in model.parameters())
        self.seconds = 0.0
        self.checkpoints = Checkpoints(
            folder, self.models, self.optimizer, self.recipe, Path.mkdir, self.layout, lambda line: None
        )

    def save(self, step: int) -> float:
        """Seconds that training stands still, in a save and before the update of the steps that follow it."""
        self.checkpoints.wait()  # until the one before last is deleted: steps lie between two saves
        dist.barrier()
        started = time.perf_counter()
        self.checkpoints.save(Progress(step, step))
        standing = time.perf_counter() - started
        while self.checkpoints._pending is not None:
            time.sleep(STEP)
            started = time.perf_counter()
            self.checkpoints.before_update()
            self.checkpoints.poll()
            standing += time.perf_counter() - started
        return standing

    def load(self, cold: bool) -> float:
        """Seconds of a load."""
        self.checkpoints.wait()
        if cold:
            forget(self.checkpoints.directory)
        dist.barrier()
        started = time.perf_counter()
        assert self.checkpoints.load_newest() is not None
        return time.perf_counter() - started


def dist_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def forget(directory: Path) -> None:
    """Take the files out of the page cache."""
    for path in directory.rglob("*.distcp"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: str, rounds: int, small: bool) -> dict[str, Any]:
    """Seconds of every turn, of the clock and of this rank's processors, by side."""
    torch.set_num_threads(1)
    saving = Run(Path(folder) / "sync", False, small)
    sides: dict[str, Callable[[int], float]] = {
        "save": saving.save,
        "save raw": lambda step: _raw(saving.save, step),
        "save as torch": lambda step: _as_torch(saving.save, step),
    }
    found: dict[str, list[tuple[float, float]]] = {}
    _take_turns(sides, found, rounds)
    saving.checkpoints._frozen_files = None  # their hashes are those of a raw save
    saving.save(10**6)  # with hashes, to be loaded
    sides = {
        "load": lambda step: saving.load(False),
        "load raw": lambda step: _raw(saving.load, False),
        "load as torch": lambda step: _as_torch(saving.load, False),
        "load from disk": lambda step: saving.load(True),
        "load from disk raw": lambda step: _raw(saving.load, True),
    }
    _take_turns(sides, found, rounds)
    size = sum(p.stat().st_size for p in list_checkpoints(saving.checkpoints.directory)[0].rglob("*"))
    saving.checkpoints.wait()
    shutil.rmtree(saving.checkpoints.directory, ignore_errors=True)
    saving.recipe.checkpoint.asynchronous = True
    saving.checkpoints = Checkpoints(
        Path(folder) / "async",
        *(saving.models, saving.optimizer, saving.recipe, Path.mkdir, saving.layout),
        lambda line: None,
    )
    _take_turns({ASYNC: saving.save}, found, rounds)
    result = {"seconds": found, "bytes": size, "parameters": saving.num_parameters}
    groups.shutdown()
    return result


def _raw(work: Callable[[Any], float], argument: Any) -> float:
    with without_hashes():
        return work(argument)


def _as_torch(work: Callable[[Any], float], argument: Any) -> float:
    """As torch and megatron-core write and read: by torch.save and torch.load, with their checksums."""
    with without_hashes(), ExitStack() as stack:
        stack.enter_context(mock.patch.object(sharded_files, "_write_value", _write_by_torch))
        read = dcp.FileSystemReader.read_data
        stack.enter_context(mock.patch.object(RestrictedReader, "read_data", read))
        return work(argument)


def _write_by_torch(stream: Any, item: Any, value: Any, key: str) -> Any:
    transforms = _StorageWriterTransforms()
    value = value._tensor if isinstance(value, HeldTensor) else value
    if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()
    return _write_item(transforms, stream, value, item, key, SerializationFormat.TORCH_SAVE)


def _take_turns(
    sides: dict[str, Callable[[int], float]], found: dict[str, list[tuple[float, float]]], rounds: int
) -> None:
    for turn in range(rounds + 1):  # the first one warms up
        order = list(sides.items())
        for number, (side, work) in enumerate(order if turn % 2 else reversed(order)):
            cpu = time.process_time()
            seconds = work(1 + turn * len(order) + number)
            if turn:
                found.setdefault(side, []).append((seconds, time.process_time() - cpu))


PAIRS = [
    *(("save", "save raw"), ("save", "save as torch"), ("load", "load raw"), ("load", "load as torch")),
    *(("load from disk", "load from disk raw"), (ASYNC, "save")),
]


def report(world: int, results: list[dict[str, Any]]) -> tuple[list[Table], list[Aim]]:
    """A row of a table for each side: the slowest rank's time, and all ranks' processors together."""
    size, parameters = results[0]["bytes"] / 1e9, results[0]["parameters"] / 1e6
    title = f"{world} rank(s), {parameters:.0f}M parameters, {size:.2f} GB"
    times = Table(title, ["side", "fastest", "median", "slowest", "of processors"])
    clock: dict[str, float] = {}
    processors: dict[str, float] = {}
    for side in results[0]["seconds"]:
        turns = list(zip(*(result["seconds"][side] for result in results), strict=True))
        each = sorted(max(seconds for seconds, _ in turn) for turn in turns)
        clock[side] = statistics.median(each)
        processors[side] = statistics.median(sum(cpu for _, cpu in turn) for turn in turns)
        seconds = (f"{value:.2f} s" for value in (each[0], clock[side], each[-1], processors[side]))
        times.add(side, *seconds)
    ratios = Table("", ["ratio", "by the clock", "of processors"])
    for side, peer in PAIRS:
        of_processors = processors[side] / processors[peer]
        ratios.add(f"{side} / {peer}", f"{clock[side] / clock[peer]:.2f}", f"{of_processors:.2f}")
    return [times, ratios], [_writing(world, clock, size), _standing(world, clock)]


def _writing(world: int, clock: dict[str, float], size: float) -> Aim:
    share = clock["save raw"] / clock["save"]
    peers = ", ".join(f"{side} {size / clock[side]:.2f} GB/s" for side in ("save raw", "save as torch"))
    found = f"{size / clock['save']:.2f} GB/s, {share:.0%}"
    return Aim(f"checkpoint save, verified, {world} rank(s)", ">= 90 % of raw", found, peers, share >= 0.9)


def _standing(world: int, clock: dict[str, float]) -> Aim:
    share = clock[ASYNC] / clock["save"]
    found, peer = f"{clock[ASYNC]:.2f} s, {share:.0%}", f"synchronous {clock['save']:.2f} s"
    name = f"training stands still in an asynchronous save, {world} rank(s)"
    return Aim(name, "<= 10 % of a synchronous one", found, peer, share <= 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (median)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument(
        "--folder", type=Path, help="where files are written (default: the system's for such)"
    )
    parser.add_argument("--small", action="store_true", help="a sixth of the parameters")
    add_json(parser)
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    result = Result(f"{machine()}; median of {args.rounds} turns; load {load()}")
    print(result.setting)
    for world in args.ranks:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            arguments = {
                "folder": str(Path(folder) / "checkpoints"),
                "rounds": args.rounds,
                "small": args.small,
            }
            files = run_processes(
                world, "checkpoint:measure", arguments, Path(folder), 3600, {"PYTHONPATH": path}
            )
            results = [torch.load(file, weights_only=True) for file in files]
        tables, aims = report(world, results)
        print("\n".join(table.markdown() for table in tables), flush=True)
        result.tables += tables
        result.aims += aims
        result.values[str(world)] = [each["seconds"] for each in results]
    result.write(args.json)


if __name__ == "__main__":
    main()
