"""Disks that are full, read-only or somebody else's, and what the ranks of a run make of them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megamm.engine import groups
from megamm.engine.checkpoint import Checkpoints, Progress
from megamm.engine.manifest import list_checkpoints, verify
from megamm.errors import RunError

PAGE = 4096
NOBODY = 65534


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of that size; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, timeout=30)


def fill(disk: Path, leave: int) -> None:
    """Take all space but `leave` bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - leave // PAGE * PAGE)


def used(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def break_full(directory: Path, leave: float) -> None:
    """`leave`: of the space that a checkpoint takes; 1: the last page is missing."""
    first = list_checkpoints(directory)[0]
    size = used(first) - used(first / "frozen")  # frozen weights are linked from now on
    fill(directory.parent, int(leave * (size - PAGE)))


def mend_full(directory: Path) -> None:
    (directory.parent / "filling").unlink()


def break_read_only(directory: Path, _: float) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(directory.parent)], check=True, timeout=30)


def mend_read_only(directory: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw", str(directory.parent)], check=True, timeout=30)


def break_permission(directory: Path, _: float) -> None:
    directory.chmod(0o500)


def mend_permission(directory: Path) -> None:
    directory.chmod(0o700)


FAULTS: dict[str, tuple[Callable[[Path, float], None], Callable[[Path], None], str]] = {
    "full": (break_full, mend_full, "No space left on device"),
    "read-only": (break_read_only, mend_read_only, "Read-only file system"),
    "permission": (break_permission, mend_permission, "Permission denied"),
}


def saves_on_a_bad_disk(directory: str, fault: str, leave: float, asynchronous: bool) -> list[Any]:
    """A good save, two that fail, one that succeeds, and too many that fail; what this rank saw of it.

    Returns:
        (what happened, seconds until this rank knew, committed steps, other names) of each.
    """
    from tests.dist.tiny import tiny_recipe
    from tests.dist.workers import Run

    path = Path(directory)
    settings = {"checkpoint.max_failures": 2, "checkpoint.asynchronous": str(asynchronous).lower()}
    run = Run(tiny_recipe("merged", {**settings, "checkpoint.keep": 9, "parallel.timeout_s": 60}))
    said: list[str] = []
    checkpoints = run.checkpoints(path, said.append)
    break_it, mend_it, _ = FAULTS[fault]
    if fault == "permission":  # none is kept from root; the results are written as root again
        os.seteuid(NOBODY)
    results = [_save(run, checkpoints, 1, said)]
    _on_rank_0(break_it, path, leave)
    results += [_save(run, checkpoints, step, said) for step in (2, 3)]
    _on_rank_0(mend_it, path)
    results.append(_save(run, checkpoints, 4, said))
    _on_rank_0(break_it, path, leave)
    results += [_save(run, checkpoints, step, said) for step in (5, 6, 7)]
    _on_rank_0(mend_it, path)
    results.append(_save(run, checkpoints, 8, said))
    _on_rank_0(break_it, path, leave)
    results.append(_save(run, checkpoints, 9, said, must_succeed=True))
    _on_rank_0(mend_it, path)
    os.seteuid(os.getuid())
    groups.shutdown()
    return results


def _on_rank_0(action: Callable[..., None], *args: Any) -> None:
    if dist.get_rank() == 0:
        action(*args)
    dist.barrier()


def _save(run: Any, checkpoints: Checkpoints, step: int, said: list[str], must_succeed: bool = False) -> Any:
    run.step(step)
    before, started = len(said), time.monotonic()
    try:
        checkpoints.save(Progress(step, 8 * step), must_succeed)
        while len(said) == before:
            checkpoints.poll()
        happened = " | ".join(said[before:])
    except RunError as error:
        happened = f"RunError: {error}"
    seconds = time.monotonic() - started
    dist.barrier()
    found = list_checkpoints(checkpoints.directory)
    steps = [verify(path, of_a_run=True).step for path in found]
    return happened, seconds, steps, [p.name for p in checkpoints.directory.iterdir() if p not in found]
