"""Saving: frozen weights stored once, files written while training goes on, nothing half-written kept."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.engine import frozen, manifest, sharded_files
from megamm.engine.checkpoint import Checkpoints, Progress, read_weights
from megamm.engine.groups import Groups
from megamm.errors import InputError, RunError
from tests.dist.tiny import tiny_recipe
from tests.dist.workers import Run
from tests.one_process import whole

ROOT = Path(__file__).resolve().parents[2]
FROZEN = {"training.freeze": "[language,vision]"}


def start(overrides: dict[str, Any] | None = None, step: int = 0, kind: str = "merged") -> Run:
    """A run after `step` steps."""
    run = Run(tiny_recipe(kind, overrides))
    for i in range(step):
        run.step(i)
    return run


def save(checkpoints: Checkpoints, step: int) -> Path:
    """Save and commit."""
    checkpoints.save(Progress(step, step * 8))
    checkpoints.wait()
    return checkpoints.directory / manifest.step_directory(step)


def files(checkpoint: Path, folder: str) -> list[Path]:
    found = sorted((checkpoint / folder).iterdir())
    assert found
    return found


def links(checkpoint: Path) -> set[int]:
    """How many names the files of frozen weights have."""
    return {path.stat().st_nlink for path in files(checkpoint, "frozen")}


def holds(checkpoint: Path, run: Run) -> bool:
    """Whether a checkpoint is undamaged and has the weights that the run has now."""
    weights, saved = whole(run.models[0]), read_weights(checkpoint)
    assert weights.keys() == saved.keys()
    return all(torch.equal(weights[name].to(saved[name].dtype), saved[name]) for name in weights)


# --- frozen weights -------------------------------------------------------------------------------------


def test_frozen_weights_are_written_once(layout: Groups, tmp_path: Path) -> None:
    run = start(FROZEN, step=1)
    checkpoints = run.checkpoints(tmp_path)
    first = save(checkpoints, 1)
    run.step(1)
    second = save(checkpoints, 2)
    assert holds(second, run) and not holds(first, run) and manifest.verify(first)

    parameters = list(run.models[0].parameters())
    trained, still = (sum(p.numel() for p in parameters if p.requires_grad is on) for on in (True, False))
    assert still > 5 * trained
    new = [
        path for folder in ("shards", "frozen") for path in files(second, folder) if path.stat().st_nlink == 1
    ]
    tensors = sum(path.stat().st_size for path in new if path.suffix == ".distcp")
    assert {path.parent.name for path in new} == {"shards"} and links(second) == {2}
    # weights and three of the optimizer, in fp32; each with what describes it in the file
    overhead = 4 * 4000 * sum(1 for p in parameters if p.requires_grad)
    assert 16 * trained <= tensors < 16 * trained + overhead < 4 * still

    # every checkpoint is whole by itself
    copy = Path(shutil.copytree(second, tmp_path / "copy"))
    shutil.rmtree(first)
    assert links(second) == {1} and holds(second, run) and holds(copy, run)


def test_old_checkpoints_go_and_the_weights_stay(layout: Groups, tmp_path: Path) -> None:
    run = start({**FROZEN, "checkpoint.keep": 1}, step=1)
    checkpoints = run.checkpoints(tmp_path)
    inodes = set()
    for step in (1, 2, 3):
        newest = save(checkpoints, step)
        assert manifest.list_checkpoints(tmp_path) == [newest] and links(newest) == {1}
        inodes.add(tuple(path.stat().st_ino for path in files(newest, "frozen")))
    assert len(inodes) == 1 and holds(newest, run)


def test_resuming_goes_on_with_the_same_files_bit_by_bit(layout: Groups, tmp_path: Path) -> None:
    run = start(FROZEN, step=2)
    checkpoints = run.checkpoints(tmp_path)
    first = save(checkpoints, 2)
    curve = [run.step(step) for step in (2, 3)]

    again = start({**FROZEN, "seed": 99})
    resumed = again.checkpoints(tmp_path)
    assert resumed.load_newest() == Progress(2, 16)
    again.schedule.step(2)
    assert [again.step(step) for step in (2, 3)] == curve
    for (name, one), (_, other) in zip(
        whole(run.models[0]).items(), whole(again.models[0]).items(), strict=True
    ):
        assert torch.equal(one, other), name
    second = save(resumed, 4)
    assert links(first) == links(second) == {2} and holds(second, again)


def test_nothing_frozen_no_directory(layout: Groups, tmp_path: Path) -> None:
    run = start(step=1)
    run.models[0].requires_grad_()  # the encoder's unused last block too
    saved = save(run.checkpoints(tmp_path), 1)
    assert not (saved / "frozen").exists() and holds(saved, run)


def other_run(run: Run, directory: Path) -> Run:
    """Another run's checkpoint lies in the directory: same shapes, other weights."""
    save(start({**FROZEN, "seed": 99}, step=1).checkpoints(directory), 1)
    return run


def changed_in_place(run: Run, directory: Path) -> Run:
    """Somebody changed a frozen weight after the first save."""
    with torch.no_grad():
        run.models[0].vision.class_embedding.add_(1)
    return run


def file_changed(run: Run, directory: Path) -> Run:
    """The files of the first save are not what they were."""
    with (directory / "step_00000001" / "frozen" / "__0_0.distcp").open("ab") as stream:
        stream.write(b"x")
    return run


def unfrozen(run: Run, directory: Path) -> Run:
    """One of the frozen weights is trained from now on."""
    run.models[0].vision.class_embedding.requires_grad_()
    return run


@pytest.mark.parametrize("happens", [other_run, changed_in_place, file_changed, unfrozen])
def test_weights_that_may_differ_are_never_linked(happens: Any, layout: Groups, tmp_path: Path) -> None:
    run = start(FROZEN, step=1)
    checkpoints = run.checkpoints(tmp_path)
    if happens is not other_run:
        save(checkpoints, 1)
    saved = save(checkpoints, 2) if happens(run, tmp_path) is run else None
    assert saved is not None and links(saved) == {1} and holds(saved, run)
    assert links(save(checkpoints, 3)) == {2}  # and from then on they are


def test_weights_of_another_precision_are_not_linked(layout: Groups, tmp_path: Path) -> None:
    run = start({**FROZEN, "training.precision": "bf16"}, step=1)
    first = save(run.checkpoints(tmp_path), 1)
    again = start(FROZEN)
    checkpoints = again.checkpoints(tmp_path)
    checkpoints.load_newest()
    again.step(1)
    second = save(checkpoints, 2)
    assert links(first) == links(second) == {1} and holds(second, again)


def test_without_hard_links_they_are_written_again(
    layout: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    said: list[str] = []
    run = start(FROZEN, step=1)
    checkpoints = run.checkpoints(tmp_path, said.append)
    for step in (1, 2, 3):
        saved = save(checkpoints, step)
        assert links(saved) == {1} and holds(saved, run)
    assert [i for i, line in enumerate(said) if "could not be linked (Operation not permitted)" in line] == [
        1
    ]


def test_checkpoints_without_frozen_files_load(
    layout: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of version 0.1 have all weights in their shards."""
    run = start(FROZEN, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(frozen, "find_frozen", lambda state: frozen.FrozenWeights({}, {}))
        old = save(run.checkpoints(tmp_path), 1)
    assert not (old / "frozen").exists() and holds(old, run)
    again = start({**FROZEN, "seed": 99})
    checkpoints = again.checkpoints(tmp_path)
    assert checkpoints.load_newest() == Progress(1, 8)
    assert holds(old, again) and links(save(checkpoints, 2)) == {1}


# --- writing in the background ----------------------------------------------------------------------------


class Gate:
    """Holds back the threads that write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        write = sharded_files._write_value

        def wait(*args: Any) -> Any:
            assert self.opened.wait(60)
            return write(*args)

        monkeypatch.setattr(sharded_files, "_write_value", wait)


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_training_goes_on_while_files_are_written(
    distributed: str, layout: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state when saving began: weights, both moments, and the next steps."""
    overrides = {"training.freeze": "[vision]", "parallel.distributed_optimizer": distributed}
    run, gate = start(overrides, step=2), Gate(monkeypatch)
    weights = whole(run.models[0])
    checkpoints = run.checkpoints(tmp_path)
    checkpoints.save(Progress(2, 16))
    checkpoints.before_update()  # (the gate keeps everything from being written)
    curve = [run.step(step) for step in (2, 3)]
    checkpoints.poll()
    assert manifest.list_checkpoints(tmp_path) == [] and len(list(tmp_path.iterdir())) == 1
    gate.opened.set()
    checkpoints.wait()

    again = start({**overrides, "seed": 99})
    assert again.checkpoints(tmp_path).load_newest() == Progress(2, 16)
    for name, weight in whole(again.models[0]).items():
        assert torch.equal(weight, weights[name]), name
    again.schedule.step(2)
    assert [again.step(step) for step in (2, 3)] == curve


def test_a_poll_commits_and_a_save_ends_the_one_before(
    layout: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(step=1)
    said: list[str] = []
    checkpoints = run.checkpoints(tmp_path, said.append)
    checkpoints.save(Progress(1, 8))
    deadline = time.monotonic() + 60
    while not manifest.list_checkpoints(tmp_path):
        assert time.monotonic() < deadline
        checkpoints.poll()
    checkpoints.save(Progress(2, 16))
    checkpoints.save(Progress(3, 24))
    assert [path.name for path in manifest.list_checkpoints(tmp_path)] == ["step_00000002", "step_00000001"]
    checkpoints.abandon()
    assert checkpoints.poll() is None and len(manifest.list_checkpoints(tmp_path)) == 2
    assert len(said) == 2 and "training stood still" in said[0]
    assert holds(save(checkpoints, 4), run) and len(list(tmp_path.iterdir())) == 2  # keep, and no remains


def test_saving_without_threads_in_the_background(layout: Groups, tmp_path: Path) -> None:
    run = start({"checkpoint.asynchronous": "false"}, step=1)
    run.checkpoints(tmp_path).save(Progress(1, 8))
    saved = tmp_path / "step_00000001"
    assert holds(saved, run)
    # parameters are views of one buffer, which is not written with each of them
    parameters = list(run.models[0].parameters())
    size = sum(path.stat().st_size for path in files(saved, "shards"))
    assert size < 16 * sum(p.numel() for p in parameters) + 4 * 4000 * len(parameters)


def test_abandoning_does_not_wait_for_the_files(
    layout: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(step=1)
    written: list[Any] = []
    write = sharded_files._write_value

    def slow(*args: Any) -> Any:
        written.append(args)
        time.sleep(0.05)
        return write(*args)

    monkeypatch.setattr(sharded_files, "_write_value", slow)
    checkpoints = run.checkpoints(tmp_path)
    checkpoints.save(Progress(1, 8))
    checkpoints.abandon()
    assert len(written) < 20
    time.sleep(0.2)
    assert len(written) < 20 and manifest.list_checkpoints(tmp_path) == []


def test_files_that_cannot_be_written_are_one_sentence(layout: Groups, tmp_path: Path) -> None:
    """The operating system's words, which torch buries under its own, and nothing left behind."""
    run = start({"checkpoint.max_failures": 0}, step=1)
    checkpoints = run.checkpoints(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        checkpoints.save(Progress(1, 8))
        with pytest.raises(
            RunError, match=r"step_00000001: cannot be written \(File too large\); free space or"
        ):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    assert holds(save(checkpoints, 2), run)


def save_without_end(directory: Path) -> None:
    """Steps and saves until somebody kills this process."""
    run = start(FROZEN, kind="cross_attention")
    checkpoints = run.checkpoints(directory)
    for step in range(10_000):
        run.step(step)
        checkpoints.poll()
        checkpoints.save(Progress(step + 1, 8))


def test_a_killed_run_leaves_only_good_checkpoints(tmp_path: Path) -> None:
    code = "import sys, pathlib; from tests.engine.test_checkpoint import *; "
    code += "save_without_end(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while len(manifest.list_checkpoints(tmp_path / "run")) < 2:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        time.sleep(random.SystemRandom().uniform(0, 2))
    finally:
        process.kill()
        process.wait()
    found = manifest.list_checkpoints(tmp_path / "run")
    complete = [path for path in found if (path / "manifest.json").exists()]  # without: being deleted
    assert len(complete) >= 2 and len(found) - len(complete) <= 1
    for checkpoint in complete:
        manifest.verify(checkpoint)


# --- what does not fit --------------------------------------------------------------------------------


def test_damaged_and_missing_frozen_files_are_named(layout: Groups, tmp_path: Path) -> None:
    run = start({**FROZEN, "checkpoint.keep": 3}, step=1)
    checkpoints = run.checkpoints(tmp_path)
    for step in (1, 2):
        saved = save(checkpoints, step)
    damaged = saved / "frozen" / "__0_1.distcp"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.unlink()  # the other checkpoint's link stays what it was
    damaged.write_bytes(bytes(content))
    with pytest.raises(InputError, match=rf"{damaged}: content changed since it was saved"):
        read_weights(saved)
    said: list[str] = []
    assert run.checkpoints(tmp_path, said.append).load_newest() == Progress(1, 8)
    assert len(said) == 1 and str(damaged) in said[0]
    shutil.rmtree(saved / "frozen")
    with pytest.raises(InputError, match=rf"{saved}/frozen/\S+: missing.*use another checkpoint"):
        manifest.verify(saved)


@pytest.mark.parametrize(
    "then, now, words",
    [
        ("language,vision", "language", r"\(\d+ weights are trained only now, such as vision\.\S+\)"),
        ("language", "language,vision", r"\(\d+ weights are trained only there, such as vision\.\S+\)"),
        ("language,vision", "connector,vision", "only now, such as language.* only there, such as connector"),
    ],
)
def test_resuming_with_other_frozen_parts(
    then: str, now: str, words: str, layout: Groups, tmp_path: Path
) -> None:
    save(start({"training.freeze": f"[{then}]"}, step=1).checkpoints(tmp_path), 1)
    run = start({"training.freeze": f"[{now}]"})
    with pytest.raises(InputError, match=rf"{words}.*set training\.freeze.*training\.init_from and another"):
        run.checkpoints(tmp_path).load_newest()


def test_resuming_with_another_kind_of_optimizer(layout: Groups, tmp_path: Path) -> None:
    save(start(FROZEN, step=1).checkpoints(tmp_path), 1)
    run = start({**FROZEN, "parallel.distributed_optimizer": "false"})
    with pytest.raises(
        InputError, match=r"optimizer state is of another kind; set parallel\.distributed_opt"
    ):
        run.checkpoints(tmp_path).load_newest()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_a_replicated_optimizer_with_other_groups(
    precision: str, layout: Groups, tmp_path: Path
) -> None:
    replicated = {"parallel.distributed_optimizer": "false", "training.precision": precision}
    save(start(replicated, step=1).checkpoints(tmp_path), 1)
    parts = {"optimizer.parts": "[{part: vision, lr: 0.0001}]"}
    run = start({**replicated, **parts})
    with pytest.raises(InputError, match=r"of 2 groups of weights, .* makes 4; set optimizer\.parts and"):
        run.checkpoints(tmp_path).load_newest()
    run = start({**replicated, "optimizer.lr": 0.5, "optimizer.no_decay": "[embeddings]"})
    assert run.checkpoints(tmp_path).load_newest() == Progress(1, 8)
