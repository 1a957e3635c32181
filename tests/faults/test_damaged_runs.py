"""F3 for whole commands: a run never starts again from nothing, and ends as if nothing had been damaged."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from megamm import cli
from megamm.engine import groups
from megamm.engine.manifest import MANIFEST
from tests.faults.checkpoints import DAMAGES, Copy, files_of
from tests.faults.conftest import FROZEN, OVERRIDES
from tests.training.runs import curve, newest_state, run

SEED = random.SystemRandom().randrange(2**32)


def all_damaged(copy: Copy) -> None:
    for step in (copy.newest, copy.older, copy.oldest):
        (step / "shards/common.pt").write_bytes(b"")


def no_manifests(copy: Copy) -> None:
    for step in (copy.newest, copy.older, copy.oldest):
        (step / MANIFEST).unlink()


def empty_directories(copy: Copy) -> None:
    for step in (copy.newest, copy.older, copy.oldest):
        shutil.rmtree(step)
        step.mkdir()


@pytest.mark.parametrize("spoil", [all_damaged, no_manifests, empty_directories])
def test_nothing_good_never_means_from_the_start(
    spoil: Any, trained: Path, copy: Copy, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(copy)
    before = sorted(copy.run_dir.rglob("*"))
    try:
        code = cli.main(["train", str(trained / "recipe.yaml"), FROZEN, f"--run_dir={copy.run_dir}"])
    finally:
        groups.shutdown()
    said = capfd.readouterr().err
    assert code == 2 and "every checkpoint is damaged" in said and said.count("\n") == 1
    assert all(str(step) in said for step in (copy.newest, copy.older, copy.oldest))
    assert sorted(copy.run_dir.rglob("*")) == before and curve(copy.run_dir) == curve(trained / "run")


def test_verify_names_every_bad_checkpoint(copy: Copy, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["verify", "--all", str(copy.run_dir)]
    assert cli.main(command) == 0
    assert [line.split(": ")[0] for line in capfd.readouterr().out.splitlines()] == [
        str(path) for path in (copy.newest, copy.older, copy.oldest)
    ]
    (copy.older / "recipe.yaml").write_text("")
    (copy.oldest / MANIFEST).unlink()
    shutil.copytree(copy.newest, copy.directory / "step_00000012")  # what it says is that of step 9
    assert cli.main(command) == 2
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 4 and [line.startswith("BAD ") for line in said] == [True, False, True, True]
    assert "step_00000012/manifest.json: is that of step 9" in said[0]
    assert f"{copy.older / 'recipe.yaml'}: 0 bytes instead of" in said[2] and "missing" in said[3]
    assert cli.main(["verify", str(copy.newest)]) == 0 and cli.main(["verify", str(copy.run_dir)]) == 2
    capfd.readouterr()
    shutil.rmtree(copy.directory / "step_00000012")
    (copy.directory / "step_00000012").mkdir()  # never completed, so it is not the newest
    assert cli.main(["verify", str(copy.run_dir)]) == 0
    assert str(copy.newest) in capfd.readouterr().out


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))
def test_two_hundred_places_before_a_run_trains(part: int, trained: Path, copy: Copy, tmp_path: Path) -> None:
    """The whole command, strict."""
    draw, log = random.Random(f"{SEED} {part}"), tmp_path / "log"
    names = files_of(copy.newest)
    for number in range(50):
        name, damage = names[number % len(names)], draw.choice(DAMAGES)
        damage(copy.newest / name, draw)
        code = run(trained / "recipe.yaml", log, FROZEN, f"--run_dir={copy.run_dir}", "--resume.strict")
        said = log.read_text()
        assert code == 2 and said.count("\n") == 1, (damage, name, said, SEED)
        assert str(copy.newest / name) in said, (damage, name, said, SEED)
        copy.repair()
        log.unlink()
    assert curve(copy.run_dir) == curve(trained / "run")


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_that_falls_back_ends_bitwise_equal(
    damage: Any, trained: Path, copy: Copy, capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(SEED)
    path = copy.newest / draw.choice(files_of(copy.newest))
    damage(path, draw)
    options = [FROZEN, *OVERRIDES, f"--run_dir={copy.run_dir}"]
    try:
        assert cli.main(["train", str(trained / "recipe.yaml"), *options]) == 0, (path, SEED)
    finally:
        groups.shutdown()
    log = (copy.run_dir / "log.txt").read_text()
    assert str(path) in log and "resumed at step 6" in log
    assert curve(copy.run_dir) == curve(trained / "run")
    one, other = newest_state(copy.run_dir), newest_state(trained / "run")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
