"""Whole training runs of a tiny model, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
import torch.distributed.checkpoint as dcp
import yaml

from megamm.engine.manifest import list_checkpoints
from megamm.training.metrics import read_metrics
from tests.data.helpers import VOCAB_SIZE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12


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


def start(recipe: Path, log: Path, *overrides: str, processes: int = 1) -> subprocess.Popen[bytes]:
    """Start `megamm train`, with torchrun for several processes; output goes to `log`."""
    launcher = ["-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, *launcher, "megamm", "train", str(recipe), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, cwd=ROOT, start_new_session=True
        )


def run(recipe: Path, log: Path, *overrides: str, processes: int = 1, timeout: float = 150) -> int:
    """Run to the end; returns the exit code."""
    process = start(recipe, log, *overrides, processes=processes)
    try:
        return process.wait(timeout)
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the process and all it started (torchrun's workers lead sessions of their own)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[bytes], timeout: float = 150) -> None:
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
    shards = str(list_checkpoints(run_dir / "checkpoints")[0] / "shards")
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
