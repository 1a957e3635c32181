"""`megamm` with a fault in it: what the processes of these tests run instead of `tests.training.runs:megamm`.

The variable FAULT says which, as JSON: {"kind": one of KINDS, "rank": 1, "steps": [7, 8]}; without "rank" it
happens on all ranks.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from megamm.training import loop
from tests.training import runs

TARGET = "tests.faults.inject:megamm"


def fault(kind: str, steps: list[int], **more: Any) -> dict[str, Any]:
    """The options of `runs.start` for a run with a fault."""
    return {"target": TARGET, "FAULT": json.dumps({"kind": kind, "steps": steps, **more})}


def megamm(*arguments: str) -> int:
    """`megamm train`, with the fault that the environment describes."""
    told = json.loads(os.environ["FAULT"])
    rank = int(os.environ.get("RANK", "0"))
    if told.get("rank", rank) == rank:
        inject(KINDS[told["kind"]], set(told["steps"]))
    return runs.megamm(*arguments)


def inject(happens: Callable[..., Any], steps: set[int]) -> None:
    """Have `happens` stand for train_step's forward and backward pass. It counts passes, so a step that is
    done again after a rollback is another one."""
    real, done = loop.forward_backward, 0

    def forward_backward(models: Any, batches: Any, groups: Any) -> float:
        nonlocal done
        done += 1
        loss = real(models, batches, groups)
        return happens(models, loss) if done in steps else loss

    loop.forward_backward = forward_backward


def hang(models: Any, loss: float) -> float:
    """The process lives, and gets no further."""
    time.sleep(10_000)
    return loss


def gradient(value: float) -> Callable[[Any, float], float]:
    """The gradients that this rank owns are no numbers, after they were reduced."""

    def happens(models: Any, loss: float) -> float:
        for model in models:
            for buffer in model.buffers:
                buffer.grad_data.fill_(value)
        return loss

    return happens


def spike(models: Any, loss: float) -> float:
    """The loss jumps."""
    return loss * 50


def bad_weights(models: Any, loss: float) -> float:
    """The update that follows goes wrong: all losses from now on are no numbers, until weights are loaded
    again."""
    real = loop.update

    def update(*args: Any) -> float:
        grad_norm = real(*args)
        with torch.no_grad():
            for model in models:
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
        loop.update = real
        return grad_norm

    loop.update = update
    return loss


KINDS: dict[str, Callable[[Any, float], float]] = {
    "hang": hang,
    "nan_loss": lambda models, loss: float("nan"),
    "nan_gradient": gradient(float("nan")),
    "inf_gradient": gradient(float("inf")),
    "spike": spike,
    "bad_weights": bad_weights,
}
