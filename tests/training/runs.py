"""Whole training runs of a tiny model, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed.checkpoint as dcp
import yaml

from megamm.cli import main
from megamm.engine.manifest import list_checkpoints
from megamm.parity.processes import free_port, torchrun_environment
from megamm.training.metrics import read_metrics
from tests import forks
from tests.data.helpers import VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12
MEGAMM = "tests.training.runs:megamm"


def write_recipe(folder: Path, dataset: Path, tokenizer: Path, assembly: str = "merged") -> Path:
    """A recipe of STEPS steps, a checkpoint every third, that trains in seconds."""
    connector = (
        {"kind": "mlp"}
        if assembly == "merged"
        else {"kind": "resampler", "num_latents": 4, "depth": 1, "num_heads": 2, "head_dim": 8}
    )
    recipe = {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "tokenizer": str(tokenizer),
        "seed": 5,
        "model": {
            "assembly": assembly,
            "language": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "ffn_hidden_size": 48,
                "vocab_size": VOCAB_SIZE,
            },
            "vision": {
                "image_size": 28,
                "patch_size": 14,
                "width": 16,
                "num_layers": 2,
                "num_heads": 2,
                "mlp_width": 32,
            },
            "connector": connector,
            "cross_attention": {"every": 2, "num_heads": 2, "head_dim": 8},
        },
        "data": {"train": str(dataset), "sequence_length": 128, "image": {"loader": "pillow"}},
        "training": {
            "steps": STEPS,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "precision": "fp32",
            "device": "cpu",
        },
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"interval": 3, "keep": 10},
        "log": {"interval": 1, "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


class Ranks:
    """Forks that find each other through torchrun's environment, and end together."""

    def __init__(
        self, count: int, target: str, arguments: list[str], environment: dict[str, str], log: Path
    ) -> None:
        self.forks: list[forks.Fork] = []
        forks.warm(count)
        port = str(free_port())
        for rank in range(count):
            place = torchrun_environment(rank, count, port)
            self.forks.append(forks.start(rank, target, arguments, {**environment, **place}, log))

    @property
    def pids(self) -> list[int]:
        """Their numbers, by rank."""
        return [fork.pid for fork in self.forks]

    def poll(self) -> int | None:
        """0 when all have ended well, the exit status of one that has not, or None while they run."""
        states = [fork.poll() for fork in self.forks]
        if failed := next((state for state in states if state), None):
            self.kill()
            return failed
        return None if None in states else 0

    def wait(self, timeout: float) -> int:
        """What `poll` says once they have ended."""
        deadline = time.monotonic() + timeout
        while (state := self.poll()) is None:
            assert time.monotonic() < deadline, "the ranks did not end in time"
            time.sleep(0.02)
        return state

    def kill(self) -> None:
        """SIGKILL for all."""
        for fork in self.forks:
            kill(fork)


Process = subprocess.Popen[bytes] | forks.Fork | Ranks


def start(
    recipe: Path,
    log: Path,
    *overrides: str,
    processes: int = 1,
    fresh: bool = False,
    target: str = MEGAMM,
    before: tuple[str, ...] = (),
    **more: str,
) -> Process:
    """Start `megamm train`; output goes to `log`.

    Args:
        fresh: as a user does it, with Python, or torchrun for several processes. Otherwise as forks, where
            they are possible.
        target: of the forks, "module:function"; it takes `before` and the arguments of the command line.
        more: environment variables.
    """
    arguments = ["train", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    if forks.possible(environment) and not fresh:
        if processes > 1:
            return Ranks(processes, target, [*before, *arguments], environment, log)
        return forks.start(0, target, [*before, *arguments], environment, log)
    assert target == MEGAMM
    launcher = ["-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *launcher, "megamm", *arguments]
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, cwd=ROOT, start_new_session=True
        )


def megamm(*arguments: str) -> int:
    """What `megamm` does in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["megamm", *arguments]
    return main()


def run(recipe: Path, log: Path, *overrides: str, timeout: float = 150, **options: Any) -> int:
    """Run to the end, with the `options` of `start`; returns the exit code."""
    process = start(recipe, log, *overrides, **options)
    try:
        return process.wait(timeout)
    finally:
        kill(process)


def kill(process: Process) -> None:
    """SIGKILL for the process and all it started (torchrun's workers lead sessions of their own)."""
    if isinstance(process, Ranks):
        return process.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def wait_for_step(run_dir: Path, step: int, process: Process, timeout: float = 150) -> None:
    """Wait until the run has logged `step`."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if any(row["step"] >= step for row in read_metrics(run_dir / "metrics.jsonl")):
            return
        assert process.poll() is None, "the run ended early"
        time.sleep(0.02)
    raise TimeoutError(f"step {step} was not reached")


def newest_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor, weights and optimizer state, of the newest checkpoint."""
    return state_of(list_checkpoints(run_dir / "checkpoints")[0])


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor, weights and optimizer state, of a checkpoint."""
    shards = str(checkpoint / "shards")
    metadata = dcp.FileSystemReader(shards).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "properties")
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(shards), no_dist=True)
    return state


def curve(run_dir: Path) -> list[tuple[int, int, float, float]]:
    """(step, consumed samples, loss, gradient norm) of every logged step."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [(row["step"], row["consumed_samples"], row["loss"], row["grad_norm"]) for row in rows]


def assert_same_end(one: Path, other: Path) -> None:
    """Two run directories: the same curve, and bitwise the same weights and moments at the end."""
    a, b = newest_state(one), newest_state(other)
    assert a.keys() == b.keys()
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in a)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert curve(one) == curve(other)
    assert [row[0] for row in curve(one)] == list(range(1, STEPS + 1))
