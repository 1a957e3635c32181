"""What is found before the first step: each kind of trouble in one sentence, and on all ranks."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from megamm.config import ParallelConfig, Recipe
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.device import pick_device
from megamm.engine import groups
from megamm.engine.groups import Groups
from megamm.errors import InputError, RunError
from megamm.planning.parameters import PartParameters
from megamm.recipe import load_recipe
from megamm.training.preflight import disk, memory, network, preflight
from tests.dist.harness import run_distributed
from tests.one_process import layout
from tests.training.runs import write_recipe

__all__ = ["layout"]

GIB = 2**30
ONLY = {
    name: [f"preflight.{other}=off" for other in ("data", "memory", "disk", "network") if other != name]
    for name in ("data", "memory", "disk", "network")
}


class Estimate(NamedTuple):
    """In place of planning.memory's."""

    total: int


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates of a tiny model."""
    monkeypatch.setattr(memory, "memory_of_stage", lambda recipe, world, stage: Estimate(1 << 20))
    monkeypatch.setattr(
        disk, "rank_parameters", lambda recipe, stage: {"all": PartParameters(10_000, 10_000)}
    )


@pytest.fixture
def make(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> Callable[..., Recipe]:
    """The recipe of a tiny run, with overrides; a string without "=" names one check that stays on."""

    def made(*overrides: str) -> Recipe:
        path = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
        expanded = [key for text in overrides for key in ONLY.get(text, [text])]
        return load_recipe(path, expanded)

    return made


@pytest.fixture
def look(layout: Groups, tokenizer: Tokenizer) -> Callable[[Recipe], list[str]]:
    """Runs the checks; what they report."""

    def looked(recipe: Recipe) -> list[str]:
        said: list[str] = []
        preflight(recipe, layout, tokenizer, said.append)
        return said

    return looked


Make, Look = Callable[..., Recipe], Callable[[Recipe], list[str]]


@pytest.fixture
def copy(dataset_dir: Path, tmp_path: Path) -> Path:
    """A dataset to be damaged (its pictures are still those of the other)."""
    return Path(shutil.copytree(dataset_dir, tmp_path / "copy"))


def test_a_good_run_passes_in_silence_and_leaves_nothing(make: Make, look: Look) -> None:
    recipe = make()
    started = time.process_time()
    assert look(recipe) == []
    assert time.process_time() - started < 1
    assert list(Path(recipe.run_dir).iterdir()) == []


# --- data ---------------------------------------------------------------------------------------------


def test_damaged_rows(make: Make, look: Look, copy: Path) -> None:
    tokens = bytearray((copy / "tokens.bin").read_bytes())
    tokens[::7] = bytes(len(tokens[::7]))
    (copy / "tokens.bin").write_bytes(tokens)
    recipe = make("data", f"data.train={copy}")
    with pytest.raises(
        InputError, match=r"^preflight\.data: .*copy: row \d+: .* is damaged.*; `megamm data check"
    ):
        look(recipe)
    warned = look(make("data", f"data.train={copy}", "preflight.data=warn"))
    assert len(warned) == 1 and warned[0].startswith("warning: preflight.data: ")
    assert look(make("data", f"data.train={copy}", "preflight.data=off")) == []


def test_validation_data_count_once_they_are_used(make: Make, look: Look, tmp_path: Path) -> None:
    keys = ["data", f"validation.data={tmp_path / 'none'}", f"validation.questions={tmp_path / 'no.json'}"]
    assert look(make(*keys)) == []
    with pytest.raises(InputError, match=r"none: is no prepared dataset; .* \| .*no\.json does not exist"):
        look(make(*keys, "validation.interval=5"))


def test_validation_data_are_cut_as_validation_cuts_them(
    make: Make, look: Look, copy: Path, dataset_dir: Path
) -> None:
    """Where every source has a length of its own, data.sequence_length is nobody's."""
    keys = ["data.sequence_length=6", f"data.train=[{{path: {dataset_dir}, sequence_length: 128}}]"]
    assert look(make("data", *keys, f"validation.data={copy}", "validation.interval=5")) == []


def test_files_of_another_size(make: Make, look: Look, copy: Path) -> None:
    with (copy / "loss_mask.bin").open("ab") as file:
        file.write(b"1")
    with pytest.raises(
        InputError, match=r"preflight\.data: .*loss_mask\.bin: contradicts .* run `megamm prepare`"
    ):
        look(make("data", f"data.train={copy}"))


def test_errors_that_name_no_file(make: Make, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamm.data.indexed import PreparedDataset

    def damaged(*_: object, **__: object) -> None:
        raise ValueError("mmap length is greater than filesize")

    monkeypatch.setattr(PreparedDataset, "__init__", damaged)
    with pytest.raises(InputError, match=r"data: /.*: cannot be read \(mmap .*\); `megamm data check /"):
        look(make("data"))


def test_another_tokenizer(make: Make, layout: Groups, tmp_path: Path) -> None:
    other = train_tokenizer(["other words than those of the dataset, and many more"] * 9, tmp_path / "o", 300)
    with pytest.raises(InputError, match="was prepared with another tokenizer than"):
        preflight(make("data"), layout, other, print)


def test_rows_in_which_nothing_is_left_to_learn(make: Make, look: Look) -> None:
    with pytest.raises(InputError, match=r"nothing is learnt in any of \d+ rows .* cut to 6 positions"):
        look(make("data", "data.sequence_length=6"))


def test_what_truncation_takes_is_told(make: Make, look: Look) -> None:
    said = look(make("data", "data.max_images=1"))
    assert any("samples that lose images to truncation; `megamm data check" in line for line in said)
    assert any("rows are cut to 128 positions and 1 images" in line for line in said)


def test_pictures(make: Make, look: Look, dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megamm.data.indexed import PreparedDataset

    monkeypatch.setattr(PreparedDataset, "read_image", lambda *_: b"no picture")
    with pytest.raises(InputError, match=r"3 of 3 pictures cannot be used \(the first: .*\); `megamm data"):
        look(make("data"))
    read = iter([b"no picture"])
    good = next(dataset_dir.parent.parent.rglob("*.jpg"), None) or next(
        dataset_dir.parent.parent.rglob("*.png")
    )
    monkeypatch.setattr(PreparedDataset, "read_image", lambda *_: next(read, good.read_bytes()))
    assert "1 of 3 pictures cannot be used" in look(make("data"))[0]


# --- memory and disk ----------------------------------------------------------------------------------


def test_memory(make: Make, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda device: 3 * GIB)
    monkeypatch.setattr(memory, "memory_of_stage", lambda recipe, world, stage: Estimate(3 * GIB + stage))
    assert look(make("memory")) == []
    monkeypatch.setattr(memory, "memory_of_stage", lambda recipe, world, stage: Estimate(4 * GIB))
    (line,) = look(make("memory"))
    assert line.startswith("warning: preflight.memory: a rank of pipeline stage 0 needs about 4.00 GiB and ")
    assert "is 3.00 GiB; lower training.micro_batch_size" in line
    with pytest.raises(InputError, match=r"^preflight\.memory: a rank of pipeline stage 0 needs about 4\.00"):
        look(make("memory", "preflight.memory=stop"))


def test_disk(make: Make, look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"language": PartParameters(3 * GIB, 0), "connector": PartParameters(GIB, GIB)}
    monkeypatch.setattr(disk, "rank_parameters", lambda recipe, stage: parts)
    recipe = make("disk", "checkpoint.keep=2", "training.precision=bf16")
    # frozen weights once, in bf16; trained ones with fp32 weights and two moments, three times
    needed = 3 * 2 * GIB + 3 * 14 * GIB

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, size))  # type: ignore[attr-defined]

    free(needed)
    assert look(recipe) == []
    free(needed - 1)
    with pytest.raises(
        InputError, match=r"48\.00 GiB free, and 3 checkpoints \(checkpoint\.keep 2, .* need 48\.00"
    ):
        look(recipe)
    # one that lies there already takes no more room
    (Path(recipe.run_dir) / "checkpoints" / "step_00000003").mkdir(parents=True)
    free(2 * 14 * GIB)
    assert look(recipe) == []
    free(2 * 14 * GIB - 1)
    with pytest.raises(InputError, match="checkpoints"):
        look(recipe)
    assert disk.checkpoints_at_once(make("checkpoint.interval=0", "checkpoint.keep=5")) == 1
    every = ["training.steps=1000", "checkpoint.interval=20", "checkpoint.keep=2"]
    assert disk.checkpoints_at_once(make(*every, "checkpoint.keep_every=50")) == 3 + 10
    assert disk.checkpoints_at_once(make(*every, "checkpoint.keep_every=20")) == 50
    assert disk.checkpoint_bytes(make("training.precision=fp32"), 1) == 12 * GIB + 12 * GIB


def test_a_run_directory_that_cannot_be_written(make: Make, look: Look, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match=r"preflight\.disk: run_dir: .*file/run cannot be written \(Not a dir"
    ):
        look(make("disk", f"run_dir={tmp_path / 'file' / 'run'}"))


# --- several processes --------------------------------------------------------------------------------


def test_what_one_rank_finds_stops_all(tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path) -> None:
    recipe = write_recipe(tmp_path, dataset_dir, tokenizer_dir)
    args = {"recipe": str(recipe), "other": str(tmp_path / "missing")}
    passed, stopped, crashed, apart = zip(*run_distributed(2, f"{__name__}:worker", args), strict=True)
    assert passed == ("", "")
    assert stopped[0] == stopped[1] and "missing: is no prepared dataset" in stopped[0]
    assert crashed[0].startswith("RunError: preflight.memory: the check failed on rank 1: no estimate")
    assert crashed[1] == "RuntimeError: no estimate"
    assert apart[0] == apart[1] and "is not the same directory on all nodes (rank 1" in apart[0]


def worker(recipe: str, other: str) -> list[str]:
    """What stops a good run, one with data missing on rank 1, one whose estimate fails there, and one whose
    rank 1 has a run directory of its own."""
    device = pick_device("cpu")
    layout, rank = groups.initialize(ParallelConfig(), device, "gloo"), int(os.environ["RANK"])
    memory.memory_of_stage = lambda *_: Estimate(1)
    disk.rank_parameters = lambda *_: {}

    def outcome(*overrides: str) -> str:
        loaded = load_recipe(Path(recipe), overrides)
        try:
            preflight(loaded, layout, Tokenizer.load(loaded.tokenizer), print)
        except (InputError, RunError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found = [outcome(), outcome(f"data.train={other}") if rank == 1 else outcome()]

    def no_estimate(*_: Any) -> Estimate:
        raise RuntimeError("no estimate")

    if rank == 1:
        memory.memory_of_stage = no_estimate
    found.append(outcome())
    memory.memory_of_stage = lambda *_: Estimate(1)
    found.append(outcome(f"run_dir={other}-{rank}"))
    return found


def test_ranks_that_do_not_answer_are_named() -> None:
    first, second, _ = run_distributed(3, f"{__name__}:late")
    for text in (first, second):
        assert "the world of rank" in text and "rank 2 did not come to it; look into the logs" in text


def late() -> str:
    layout = groups.initialize(ParallelConfig(timeout_s=30), pick_device("cpu"), "gloo")
    if dist.get_rank() == 2:
        time.sleep(6)
        return ""
    try:
        network.check_network(layout, timeout_s=2)
    except RunError as error:
        return str(error)
    return "came"


def test_sums_are_right_in_every_group() -> None:
    assert run_distributed(4, f"{__name__}:summed") == [[], [], [], []]


def summed() -> list[str]:
    parallel = ParallelConfig(tensor=2, pipeline=2)
    return network.check_network(groups.initialize(parallel, pick_device("cpu"), "gloo"), 60).problems


def test_a_wrong_sum_is_a_problem(layout: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = SimpleNamespace(size=lambda: 2)
    groups_of_two = SimpleNamespace(tp=pair, pp=None, cp=None, dp=pair, dp_cp=pair, mp=pair)
    monkeypatch.setattr(network.dist, "get_process_group_ranks", lambda _: [0, 1])
    monkeypatch.setattr(network, "_sum", lambda name, *_: 4 if name == "tp" else 3)
    found = network.check_network(replace(layout, collection=groups_of_two), 60)  # type: ignore[arg-type]
    (problem,) = found.problems
    assert "the sum over the tensor-parallel group of rank 0 came out wrong (4 instead of 3)" in problem
