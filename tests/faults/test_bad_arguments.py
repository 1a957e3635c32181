"""Every subcommand with something else in the place of each of its paths (F14): one sentence, in time."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megamm.cli import entry
from tests.cli.test_cli import subcommands
from tests.faults.commands import COMMANDS, INSTEAD, Ground, PathArgument, replaced, words
from tests.faults.run_command import run_command

DRAWN = 14  # of some hundred cases, in the short form
# What an interrupted command may leave: a run that has begun, what `megamm prepare` goes on from.
BEGUN = {"train": {"run"}, "prepare": {".data.partial"}}
UNREADABLE = "no permission"


class Case(NamedTuple):
    """A subcommand, the number of one of its paths, what stands there, and what should."""

    command: str
    number: int
    kind: str
    place: PathArgument

    @property
    def is_good(self) -> bool:
        """Whether this is something that may stand there."""
        if self.command == "evaluate" and self.kind == "missing" and self.place.kind == "new file":
            return True  # it makes the folders
        if self.place.kind == "new file":
            return self.kind not in ("missing", "empty directory", "long name", "below a file", "empty name")
        if self.place.kind == "new directory":
            return self.kind in ("missing", "empty directory", "surrogate")
        # pictures that cannot be found are told, and left out of the panels
        return self.command == "train" and "validation.images" in self.option

    @property
    def option(self) -> str:
        line, places = words(self.command, NOWHERE)
        return line[places[self.number].index]


NOWHERE = Ground(*[Path("x")] * 9)


def cases() -> Iterator[Case]:
    for name in COMMANDS:
        for number, place in enumerate(words(name, NOWHERE)[1]):
            for kind in (*INSTEAD, UNREADABLE):
                if place.kind.startswith("new") and kind in ("pipe", "endless device"):
                    continue  # what reads a pipe's other end may come later; a device takes everything
                yield Case(name, number, kind, place)


def test_every_subcommand_is_in_the_table() -> None:
    assert set(COMMANDS) == set(subcommands(entry.build_parser()))


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", COMMANDS)
def test_good_arguments_are_good(name: str, ground: Ground, tmp_path: Path) -> None:
    """Or else what is wrong below might be something else."""
    outcome = run_command(words(name, ground)[0], tmp_path / "log", timeout=200)
    empty(ground)
    assert outcome.code == 0 or name == "doctor", outcome


def check(case: Case, ground: Ground, folder: Path) -> None:
    line, places = words(case.command, ground)
    folder.mkdir()
    if case.kind == UNREADABLE:
        path = without_permission(folder, places[case.number], line)
    else:
        path = INSTEAD[case.kind](folder)
    line = replaced(line, places[case.number], path)
    outcome = run_command(line, folder.parent / "log", unprivileged=case.kind == UNREADABLE)
    left = sorted(path.name for path in ground.out.iterdir())
    empty(ground)
    if outcome.code == 0:
        assert case.is_good, f"{line}: {case}"
        return
    assert outcome.code in (1, 2), f"{line}: {outcome}"
    assert len(outcome.said) == 1 and "Traceback" not in outcome.text, f"{line}: {outcome}"
    assert set(left) <= BEGUN.get(case.command, set()), f"{line}: left {left}"


def without_permission(folder: Path, place: PathArgument, line: list[str]) -> Path:
    """A copy of the good file or folder that may not be read, or a place where nothing may be made."""
    good = Path(line[place.index].rpartition("=")[2])
    path = folder / "copy"
    if place.kind.startswith("new"):
        path.mkdir(mode=0o500)
        return path / "new"
    (shutil.copytree if good.is_dir() else shutil.copy)(good, path)
    path.chmod(0)
    return path


def empty(ground: Ground) -> None:
    shutil.rmtree(ground.out)
    ground.out.mkdir()


def test_some_arguments(ground: Ground, tmp_path: Path) -> None:
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    for number, case in enumerate(random.Random(seed).sample(list(cases()), DRAWN)):
        check(case, ground, tmp_path / str(number))


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", COMMANDS)
def test_all_arguments(name: str, ground: Ground, tmp_path: Path) -> None:
    for number, case in enumerate(case for case in cases() if case.command == name):
        check(case, ground, tmp_path / str(number))
