"""What makes a directory a checkpoint: a manifest with the size and hash of every file.

The manifest is written last, into a temporary directory that is then renamed: a directory without a
valid manifest was never committed. Layout of a run:

    RUN_DIR/checkpoints/step_00000100/{manifest.json, recipe.yaml, tokenizer/, shards/, frozen/}

`frozen/` holds the weights that the run does not train, if there are any; its files are hard links to those
of the checkpoint before.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from xxhash import xxh3_128

from megamm.engine.manifest_format import Algorithm, FileEntry, Manifest, ManifestError, Progress, parse
from megamm.errors import InputError

__all__ = ["FileEntry", "Manifest", "Progress"]

MANIFEST = "manifest.json"
AT_ONCE = 1 << 18  # bytes that are hashed while they are in the cache
MAX_MANIFEST_BYTES = 1 << 26
INCOMPLETE = ".incomplete-"  # prefix of a checkpoint that is being written
_REPLACED = ".replaced-"  # prefix of one whose name another is about to take
_STEP_DIRECTORY = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(InputError):
    """A checkpoint that is not as it was saved. Another one may be good."""


class UntrustedCheckpoint(InputError):
    """A checkpoint with something in it that no checkpoint of megamm needs, and that might run code."""


def step_directory(step: int) -> str:
    """Name of the checkpoint of an optimizer step."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint's directory is named after."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(directory: Path, newest: int | None = None) -> list[Path]:
    """Checkpoints by their names below a `checkpoints` directory, newest first. Whether they were completed,
    and are good, is for `read_committed` and `verify` to say.

    Args:
        newest: leave out those of later steps; None: all.
    Raises:
        InputError: the directory is there, and cannot be read.
    """
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{directory}: {error.strerror}; fix the permissions or the disk") from None
    found = [directory / name for name in names if _STEP_DIRECTORY.fullmatch(name)]
    wanted = [path for path in found if newest is None or step_of(path) <= newest]
    return sorted(wanted, key=step_of, reverse=True)


def resolve(path: str | Path) -> Path:
    """The checkpoint meant by a run directory, a `checkpoints` directory or a checkpoint itself. Of a run it
    is the newest one that was completed.

    Raises:
        InputError: there is none.
    """
    path = Path(path).expanduser()
    if (path / MANIFEST).is_file() or (path / "shards").is_dir():
        return path
    for directory in (path / "checkpoints", path):
        found = list_checkpoints(directory)
        if found:
            return next((each for each in found if (each / MANIFEST).is_file()), found[0])
    raise InputError(
        f"{path}: no checkpoint here; give a run directory or one of its checkpoints/step_* folders"
    )


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check the manifest itself.

    Raises:
        DamagedCheckpoint: it is missing, unreadable or altered.
    """
    path = checkpoint / MANIFEST
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_MANIFEST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedCheckpoint(
            f"{path}: missing, so this checkpoint was never completed; use another one"
        ) from None
    except OSError as error:
        raise DamagedCheckpoint(
            f"{path}: cannot be read ({error.strerror}); use another checkpoint"
        ) from None
    except ManifestError as error:
        raise DamagedCheckpoint(f"{path}: {error}; use another checkpoint") from None


def read_committed(checkpoint: Path) -> Manifest:
    """`read_manifest` of one of a run's checkpoints, which has to be the one of its directory's name.

    Raises:
        DamagedCheckpoint: it is not, or has no valid manifest.
    """
    manifest = read_manifest(checkpoint)
    # weights alone are of no step, whatever the directory is called
    if manifest.has_optimizer and step_directory(manifest.step) != checkpoint.name:
        raise DamagedCheckpoint(
            f"{checkpoint / MANIFEST}: is that of step {manifest.step}, so the directory was renamed or its "
            f"content exchanged; use another checkpoint"
        )
    return manifest


def files_below(directory: Path) -> list[str]:
    """All files below `directory`, as sorted relative paths, without the manifest."""
    found = (p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return sorted(name for name in found if name != MANIFEST)


def hash_file(path: Path, algorithm: Algorithm = "xxh3_128") -> FileEntry:
    """Size and hash of a file."""
    digest = xxh3_128() if algorithm == "xxh3_128" else hashlib.sha256()
    buffer, size = memoryview(bytearray(AT_ONCE)), 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileEntry(size, digest.hexdigest(), algorithm)


def find_damage(checkpoint: Path, names: list[str], files: dict[str, FileEntry]) -> list[str]:
    """What is wrong with the files `names`, one phrase each; empty if all are as the manifest says."""
    root = checkpoint.resolve()
    found = ((checkpoint / name, _damage(checkpoint / name, files[name], root)) for name in names)
    return [f"{path}: {phrase}" for path, phrase in found if phrase]


def _damage(path: Path, entry: FileEntry, root: Path) -> str | None:
    try:
        if not path.resolve().is_relative_to(root):
            return "is a link to somewhere outside of the checkpoint"
        if not path.is_file():
            return "missing"
        if path.stat().st_size != entry.size:
            return f"{path.stat().st_size} bytes instead of {entry.size}"
        if hash_file(path, entry.algorithm) != entry:
            return f"content changed since it was saved ({entry.algorithm} differs)"
    except (OSError, RuntimeError) as error:  # pathlib's error for a link to itself is a RuntimeError
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"
    return None


def verify(checkpoint: Path, of_a_run: bool = False) -> Manifest:
    """Check every byte of a checkpoint against its manifest.

    Args:
        of_a_run: the directory's name says which step it is of.
    Raises:
        DamagedCheckpoint: naming each damaged file.
    """
    manifest = read_committed(checkpoint) if of_a_run else read_manifest(checkpoint)
    refuse(find_damage(checkpoint, sorted(manifest.files), manifest.files))
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
        refuse(find_damage(self._checkpoint, sorted(files.keys() - large), files))
        self._jobs = [
            self._pool.submit(find_damage, self._checkpoint, [name], files) for name in sorted(large)
        ]
        return self

    def wait(self) -> None:
        """Return when all files were found to be as they were saved."""
        refuse([phrase for job in self._jobs for phrase in job.result()])

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is not None and issubclass(kind, Exception):
                is_input = issubclass(kind, InputError) and not issubclass(kind, UntrustedCheckpoint)
                if not is_input:  # else: the user's, whatever the files hold
                    self.wait()
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)


def refuse(damage: list[str]) -> None:
    """Raise DamagedCheckpoint if there are any phrases of `find_damage`."""
    if damage:
        raise DamagedCheckpoint("; ".join(damage) + "; use another checkpoint or restore the file")


# --- writing and removing -----------------------------------------------------------------------------


def commit(temporary: Path, final: Path, manifest: Manifest, durable: bool = True) -> None:
    """Write the manifest, make all files durable, and give the directory its name.

    Args:
        durable: wait until the disk has everything. Without it the checkpoint may be found damaged after a
            power failure: fit for what can be made again.
    """
    (temporary / MANIFEST).write_text(manifest.to_json())
    for path in [*temporary.rglob("*"), temporary] if durable else []:
        _sync(path)
    replaced = final.parent / f"{_REPLACED}{final.name}"
    if final.exists():  # the same step saved again, e.g. after a damaged one was passed over
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)  # `tidy` gives it back if this process ends here
    temporary.rename(final)
    if durable:
        _sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tidy(directory: Path) -> None:
    """Remove what killed saves have left in a `checkpoints` directory.

    Raises:
        OSError: something cannot be removed.
    """
    for left in list(directory.glob(f"{_REPLACED}*")):
        final = directory / left.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(left)
        else:
            left.rename(final)
    for left in list(directory.glob(f"{INCOMPLETE}*")):
        shutil.rmtree(left)


def remove_old(directory: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Delete the checkpoints that `retire_old` chooses; returns them."""
    old = retire_old(directory, keep, keep_every)
    for checkpoint in old:
        shutil.rmtree(checkpoint)
    return old


def retire_old(directory: Path, keep: int, keep_every: int = 0) -> list[Path]:
    """Begin to delete checkpoints that are older than the newest `keep` ones with a valid manifest.

    What has none does not count, and is deleted only if it is older, too: a newer release may have written
    it.

    Args:
        keep_every: those of multiples of so many steps stay; 0: none.
    Returns:
        Those whose files are to be deleted now.
    """
    found = list_checkpoints(directory)
    good = [checkpoint for checkpoint in found if _is_committed(checkpoint)]
    if not good:
        return []
    oldest = step_of(good[:keep][-1])
    old = [checkpoint for checkpoint in found if step_of(checkpoint) < oldest]
    if keep_every:
        old = [each for each in old if each not in good or step_of(each) % keep_every]
    for checkpoint in old:
        # the manifest goes first: a half-deleted checkpoint must not look like a committed one
        (checkpoint / MANIFEST).unlink(missing_ok=True)
    return old


def remove_newer(directory: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`."""
    for checkpoint in list_checkpoints(directory):
        if step_of(checkpoint) > step:
            (checkpoint / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)


def _is_committed(checkpoint: Path) -> bool:
    try:
        read_committed(checkpoint)
    except InputError:
        return False
    return True
