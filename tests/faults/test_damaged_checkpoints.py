"""F3, F4: damage of every kind, in every kind of file, is found before a step is trained, and the newest good
checkpoint by looking at all of them. One process, one model, some tens of damages."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megamm.engine import groups, manifest, reading
from megamm.engine.manifest import MANIFEST
from megamm.engine.manifest_format import spelled
from megamm.errors import InputError
from megamm.recipe import load_recipe
from megamm.training.setup import build_session
from tests.faults.checkpoints import DAMAGES, STEPS, Copy, files_of, swap
from tests.faults.conftest import FROZEN

SEED = random.SystemRandom().randrange(2**32)


class Resume:
    """What a run does first, without its steps: `load_newest`, again and again with the same model."""

    def __init__(self, trained: Path, folder: Path) -> None:
        overrides = [FROZEN, f"--run_dir={folder / 'other'}", "--training.steps=9"]
        self.said: list[str] = []
        self.checkpoints = build_session(load_recipe(trained / "recipe.yaml", overrides), print).checkpoints
        self.checkpoints.report = self.said.append

    def __call__(self, directory: Path) -> int:
        """The step it goes on from; what is said about damage is left in `said`."""
        self.said.clear()
        self.checkpoints.directory = directory
        progress = self.checkpoints.load_newest()
        self.said[:] = [line for line in self.said if "the recipe is not the one" not in line]
        return progress.step if progress else 0


@pytest.fixture(scope="module")
def resume(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resume]:
    yield Resume(trained, tmp_path_factory.mktemp("resume"))
    groups.shutdown()


def found(resume: Resume, copy: Copy, path: Path, what: str) -> None:
    """Damage of the newest checkpoint: one line that names the file, and the next older one."""
    assert resume(copy.directory) == 6, (what, resume.said)
    assert len(resume.said) == 1 and str(path) in resume.said[0] and "\n" not in resume.said[0], what


# --- damage ---------------------------------------------------------------------------------------------


def test_every_kind_of_damage_in_every_kind_of_file(resume: Resume, copy: Copy) -> None:
    draw = random.Random(SEED)
    assert resume(copy.directory) == 9 and resume.said == []
    for name in files_of(copy.newest):
        for damage in draw.sample(DAMAGES, 2):
            path = copy.newest / name
            damage(path, draw)
            found(resume, copy, path, f"{damage.__name__} of {name}, seed {SEED}")
            copy.repair()
    assert resume(copy.directory) == 9 and resume.said == []


def test_files_of_two_checkpoints_swapped(resume: Resume, copy: Copy) -> None:
    for name in files_of(copy.newest):
        one, other = copy.newest / name, copy.older / name
        if one.read_bytes() == other.read_bytes():
            continue  # the recipe, the tokenizer and frozen weights are the same in all
        swap(one, other)
        assert resume(copy.directory) == 3
        assert [str(one) in resume.said[0], str(other) in resume.said[1], len(resume.said)] == [True, True, 2]
        copy.repair()


def test_swapped_directories(resume: Resume, copy: Copy) -> None:
    copy.newest.rename(copy.directory / "aside")
    copy.older.rename(copy.newest)
    (copy.directory / "aside").rename(copy.older)
    assert resume(copy.directory) == 3
    assert "manifest.json: is that of step 6, so the directory was renamed" in resume.said[0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
@pytest.mark.parametrize(
    "name", [MANIFEST, "recipe.yaml", "shards/.metadata", "shards/__0_0.distcp", "shards"]
)
def test_files_that_may_not_be_read(name: str, resume: Resume, copy: Copy) -> None:
    for folder in copy.run_dir.parents:
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    (copy.newest / name).chmod(0)
    os.seteuid(65534)
    try:
        assert resume(copy.directory) == 6
    finally:
        os.seteuid(0)
    assert len(resume.said) == 1 and "cannot be read (Permission denied" in resume.said[0]
    assert str(copy.newest / name) in resume.said[0] and "\n" not in resume.said[0]


@pytest.mark.parametrize("owner, function", [(manifest, "hash_file"), (reading.OpenFile, "fill")])
def test_a_disk_that_fails(
    owner: object, function: str, resume: Resume, copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While files are compared, and while tensors are read from them."""
    whole = getattr(owner, function)

    def failing(file: Path | reading.OpenFile, *args: object) -> object:
        path = file if isinstance(file, Path) else file.path
        if path.name == "__0_1.distcp" and "step_00000009" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(file, *args)

    monkeypatch.setattr(owner, function, failing)
    assert resume(copy.directory) == 6
    assert len(resume.said) == 1 and "\n" not in resume.said[0]
    assert re.search(r"passed over: \S+/__0_1\.distcp: cannot be read \(Input/output error\)", resume.said[0])


def test_strict_does_not_fall_back(resume: Resume, copy: Copy) -> None:
    (copy.newest / MANIFEST).unlink()
    resume.checkpoints._recipe.resume.strict = True
    try:
        with pytest.raises(InputError, match=f"{copy.newest / MANIFEST}: missing"):
            resume(copy.directory)
    finally:
        resume.checkpoints._recipe.resume.strict = False


# --- what is newest -------------------------------------------------------------------------------------


def test_tracker_files_decide_nothing(resume: Resume, copy: Copy) -> None:
    """As Megatron and others write them, in whatever state."""
    for content in (b"", b"99999999", b"release", b"\xff\0garbage", b"step_00000003", b"9" * 10_000):
        for name in ("latest_checkpointed_iteration.txt", "latest", "latest_step"):
            for folder in (copy.run_dir, copy.directory):
                (folder / name).write_bytes(content)
        assert resume(copy.directory) == 9 and resume.said == []


@pytest.mark.parametrize("content", ["nothing", "garbage", "no manifest", "future", "older"])
def test_a_directory_of_the_future_is_passed_over(content: str, resume: Resume, copy: Copy) -> None:
    future = copy.directory / "step_99999999"
    if content == "older":
        shutil.copytree(copy.older, future)
    else:
        future.mkdir()
    if content == "garbage":
        (future / MANIFEST).write_bytes(random.SystemRandom().randbytes(5000))
    elif content == "no manifest":
        shutil.copytree(copy.newest / "shards", future / "shards")
    elif content == "future":
        (future / MANIFEST).write_text(spelled({"format_version": 2, "parts": []}))
    assert resume(copy.directory) == 9
    assert len(resume.said) == 1 and f"passed over: {future / MANIFEST}: " in resume.said[0]


def test_remains_of_killed_saves_are_removed_when_a_run_starts(resume: Resume, copy: Copy) -> None:
    left = copy.directory / ".incomplete-step_00000012-0badcafe"
    shutil.copytree(copy.newest, left)
    copy.older.rename(copy.directory / f".replaced-{copy.older.name}")  # killed between two renames
    shutil.copytree(copy.oldest, copy.directory / f".replaced-{copy.newest.name}")
    assert resume(copy.directory) == 9 and resume.said == []
    assert {path.name for path in copy.directory.iterdir()} == {f"step_{step:08d}" for step in STEPS}
