"""What makes a directory a checkpoint: a manifest with the size and hash of every file.

The manifest is written last, into a temporary directory that is then renamed: a directory without a
valid manifest was never committed. Layout of a run:

    RUN_DIR/checkpoints/step_00000100/{manifest.json, recipe.yaml, tokenizer/, shards/, frozen/}

`frozen/` holds the weights that the run does not train, if there are any; its files are hard links to those
of the checkpoint before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megamm.errors import InputError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_STEP_DIRECTORY = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Progress:
    """How far a stage has come.

    Attributes:
        data_position, data_sources: see Manifest; nothing where only the number of samples is known.
        anomalies: see Manifest.
    """

    step: int = 0
    consumed_samples: int = 0
    data_position: list[int] = field(default_factory=list)
    data_sources: list[dict[str, Any]] = field(default_factory=list)
    anomalies: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and hash of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The commit record of a checkpoint.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples of the stage seen so far.
        data_position: of them, those of each group of sources that share their steps; where the data stream
            goes on. Older checkpoints, of one group, have none.
        data_sources: what the groups consist of, as the data path describes it.
        anomalies: updates left out so far, as the training loop counts them.
        layout: parallel sizes it was saved with (any other can load it).
        recipe_sha256: of the recipe it was trained with.
        has_optimizer: whether training can go on from it.
        files: path below the checkpoint -> size and hash.
    """

    step: int
    consumed_samples: int
    layout: dict[str, int]
    recipe_sha256: str
    has_optimizer: bool
    files: dict[str, FileEntry] = field(default_factory=dict)
    data_position: list[int] = field(default_factory=list)
    data_sources: list[dict[str, Any]] = field(default_factory=list)
    anomalies: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def progress(self) -> Progress:
        """Where training goes on."""
        return Progress(
            self.step, self.consumed_samples, self.data_position, self.data_sources, self.anomalies
        )

    def to_json(self) -> str:
        content = asdict(self)
        return json.dumps({**content, "self_sha256": _hash_of(content)}, indent=1, sort_keys=True) + "\n"


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def step_directory(step: int) -> str:
    """Name of the checkpoint of an optimizer step."""
    return f"step_{step:08d}"


def list_checkpoints(directory: Path, newest: int | None = None) -> list[Path]:
    """Committed checkpoints below a `checkpoints` directory, newest first (not verified).

    Args:
        newest: leave out those of later steps; None: all.
    """
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if _STEP_DIRECTORY.fullmatch(p.name) and p.is_dir()]
    steps = {p: int(p.name[5:]) for p in found}
    wanted = [p for p in found if newest is None or steps[p] <= newest]
    return sorted(wanted, key=steps.__getitem__, reverse=True)


def resolve(path: str | Path) -> Path:
    """The checkpoint meant by a run directory, a `checkpoints` directory or a checkpoint itself.

    Raises:
        InputError: there is none.
    """
    path = Path(path).expanduser()
    if (path / MANIFEST).is_file() or (path / "shards").is_dir():
        return path
    for directory in (path / "checkpoints", path):
        found = list_checkpoints(directory)
        if found:
            return found[0]
    raise InputError(
        f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_* folders"
    )


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest itself.

    Raises:
        InputError: it is missing, unreadable or altered.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text())
        claimed = content.pop("self_sha256")
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(**{**content, "files": files})
    except FileNotFoundError:
        raise InputError(
            f"{path}: missing, so this checkpoint was never completed; use another one"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f"{path}: not a readable manifest; use another checkpoint") from None
    if claimed != _hash_of(content):
        raise InputError(
            f"{path}: altered since it was written (its hash does not match); use another checkpoint"
        )
    if manifest.format_version != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {manifest.format_version}, this megamm reads {FORMAT_VERSION}"
        )
    return manifest


def files_below(directory: Path) -> list[str]:
    """All files below `directory`, as sorted relative paths, without the manifest."""
    found = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return sorted(name for name in found if name != MANIFEST)


def hash_file(path: Path) -> FileEntry:
    """Size and sha256 of a file."""
    with path.open("rb", buffering=0) as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileEntry(stream.tell(), digest.hexdigest())


def find_damage(checkpoint: Path, names: list[str], files: dict[str, FileEntry]) -> list[str]:
    """What is wrong with the files `names`, one phrase each; empty if all are as the manifest says."""
    damage = []
    for name in names:
        path, entry = checkpoint / name, files[name]
        if not path.is_file():
            damage.append(f"{path}: missing")
        elif path.stat().st_size != entry.size:
            damage.append(f"{path}: {path.stat().st_size} bytes instead of {entry.size}")
        elif hash_file(path) != entry:
            damage.append(f"{path}: content changed since it was saved (sha256 differs)")
    return damage


def verify(checkpoint: Path) -> Manifest:
    """Check every byte of a checkpoint against its manifest.

    Raises:
        InputError: naming each damaged file.
    """
    manifest = read_manifest(checkpoint)
    _refuse(find_damage(checkpoint, sorted(manifest.files), manifest.files))
    return manifest


class Verification:
    """A checkpoint's large files are compared with its manifest while something is made of them, its small
    ones before. `wait` has to come before the result is used.

    Raises:
        InputError: from `with` or `wait`, naming each damaged file; also in place of an error that damage
            may have caused.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="verify")
        self._jobs: list[Future[list[str]]] = []

    def __enter__(self) -> Verification:
        files = read_manifest(self._checkpoint).files
        large = {name for name in files if name.endswith(".distcp")}
        _refuse(find_damage(self._checkpoint, sorted(files.keys() - large), files))
        self._jobs = [
            self._pool.submit(find_damage, self._checkpoint, [name], files) for name in sorted(large)
        ]
        return self

    def wait(self) -> None:
        """Return when all files were found to be as they were saved."""
        _refuse([phrase for job in self._jobs for phrase in job.result()])

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is not None and issubclass(kind, Exception) and not issubclass(kind, InputError):
                self.wait()
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)


def _refuse(damage: list[str]) -> None:
    if damage:
        raise InputError("; ".join(damage) + "; use another checkpoint or restore the file")


def commit(temporary: Path, final: Path, manifest: Manifest, durable: bool = True) -> None:
    """Write the manifest, make all files durable, and give the directory its name.

    Args:
        durable: wait until the disk has everything. Without it the checkpoint may be found damaged after a
            power failure: fit for what can be made again.
    """
    (temporary / MANIFEST).write_text(manifest.to_json())
    for path in [*temporary.rglob("*"), temporary] if durable else []:
        _sync(path)
    if final.exists():  # the same step saved again, e.g. after a damaged one was passed over
        shutil.rmtree(final)
    temporary.rename(final)
    if durable:
        _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_old(directory: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints; returns the deleted ones."""
    old = list_checkpoints(directory)[keep:]
    for checkpoint in old:
        # the manifest goes first: a half-deleted checkpoint must not look like a committed one
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    return old


def remove_newer(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`."""
    for checkpoint in list_checkpoints(directory):
        if int(checkpoint.name[5:]) > step:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)
