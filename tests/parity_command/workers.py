"""Processes of `megamm parity` in which one thing is wrong."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from megamm.parity.worker import run
from tests.dist.workers import without_sequence_parallel_marks, without_shared_encoder_gradients


def unmarked(recipe: str) -> dict[str, Any]:
    """Gradients of norms and gates are not summed over the shards of the sequence."""
    return run(recipe, without_sequence_parallel_marks)


def unshared(recipe: str) -> dict[str, Any]:
    """Each rank keeps the encoder's gradient of the images it was dealt."""
    return run(recipe, without_shared_encoder_gradients)


def wrong_mlp(recipe: str) -> dict[str, Any]:
    """One weight of decoder layer 2 is another on rank 1."""
    return run(recipe, lambda models: _disturb(models, "language.decoder.layers.2.mlp.linear_fc2.weight"))


def wrong_encoder(recipe: str) -> dict[str, Any]:
    """One weight of encoder block 1 is another on rank 1."""
    return run(recipe, lambda models: _disturb(models, "vision.blocks.1.mlp.fc1.weight"))


def _disturb(models: list[Any], name: str) -> None:
    if os.environ["RANK"] == "1":
        with torch.no_grad():
            dict(models[0].named_parameters())[name][0, 0] += 0.01


def dying(recipe: str) -> dict[str, Any]:
    """Rank 1 fails while rank 0 waits for it."""
    _note_process()
    if os.environ["RANK"] == "1":
        raise RuntimeError("out of paper")
    time.sleep(600)
    return {}


def hanging(recipe: str) -> dict[str, Any]:
    """No rank ever answers."""
    _note_process()
    print("waiting for a printer", flush=True)
    time.sleep(600)
    return {}


def _note_process() -> None:
    open(f"{os.environ['PID_DIR']}/{os.getpid()}.pid", "w").close()
