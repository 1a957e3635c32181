"""A run that kills itself while it saves: `megamm(phase, save, rank, ...)` is the command line of a process
that ends with SIGKILL in a phase of its `save`-th save, if it is that rank."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamm.engine import checkpoint, manifest, sharded_files
from megamm.engine.sharded_files import ShardedSave
from tests.training import runs

TARGET = f"{__name__}:megamm"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class At:
    """Counts saves by their temporary directories."""

    def __init__(self, save: int) -> None:
        self.save, self._seen = save, set[str]()

    def __call__(self, path: Path) -> bool:
        """Whether `path` belongs to the save that is meant."""
        name = next((part for part in path.parts if part.startswith(manifest.INCOMPLETE)), None)
        if name is not None:
            self._seen.add(name)
        return name is not None and len(self._seen) == self.save


def _around(owner: Any, name: str, before: Callable[..., None], after: Callable[..., None]) -> None:
    real = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        before(*args)
        result = real(*args, **kwargs)
        after(*args)
        return result

    setattr(owner, name, replaced)


def _is_whole(path: Path) -> bool:
    """Whether it is the directory: torch renames its index, too."""
    return path.name.startswith(manifest.INCOMPLETE)


def nothing(*args: Any) -> None:
    pass


def small_files(at: At) -> None:
    """The directory has its first files."""
    _around(checkpoint, "describe_run", nothing, lambda folder, *rest: die() if at(folder) else None)


def shards(at: At) -> None:
    """Half a file of tensors is written."""

    def half(stream: Any, *args: Any) -> None:
        if at(Path(stream.name)) and stream.tell() > 3000:
            stream.flush()
            die()

    _around(sharded_files, "_write_value", half, nothing)


def before_index(at: At) -> None:
    """All files of tensors are there."""
    _around(ShardedSave, "complete", lambda save, *rest: die() if at(save.directory) else None, nothing)


def after_index(at: At) -> None:
    """The index is there, too."""
    _around(ShardedSave, "complete", nothing, lambda save, *rest: die() if at(save.directory) else None)


def half_manifest(at: At) -> None:
    """The manifest ends in the middle."""

    def half(path: Path, text: str, *rest: Any) -> None:
        if path.name == manifest.MANIFEST and at(path):
            path.write_bytes(text[: len(text) // 2].encode())
            die()

    _around(Path, "write_text", half, nothing)


def before_rename(at: At) -> None:
    """Everything is there but the name."""
    _around(Path, "rename", lambda path, to: die() if _is_whole(path) and at(path) else None, nothing)


def after_rename(at: At) -> None:
    """It has just got its name."""
    _around(Path, "rename", nothing, lambda path, to: die() if _is_whole(path) and at(path) else None)


def removal(at: At) -> None:
    """An old one is half removed."""

    def half(path: Path, *rest: Any) -> None:
        if path.name.startswith("step_"):
            shutil.rmtree(path / "tokenizer")
            die()

    _around(checkpoint.manifests.shutil, "rmtree", half, nothing)


PHASES = {
    phase.__name__: phase
    for phase in (
        *(small_files, shards, before_index, after_index),
        *(half_manifest, before_rename, after_rename, removal),
    )
}
COMMITTED = {"after_rename", "removal"}  # in which the checkpoint exists


def megamm(phase: str, save: str, rank: str, *arguments: str) -> int:
    """What `megamm` does, up to its end."""
    if os.environ.get("RANK", "0") == rank:
        PHASES[phase](At(int(save)))
    return runs.megamm(*arguments)
