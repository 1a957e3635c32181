"""Time and memory of a step as one size grows: each measurement is a fork of a process that trained
nothing."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from common import seconds_of
from sides import Ours
from step_sizes import IMAGE_ID, batch_of, pixels_of

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.engine import groups
from megamm.engine.groups import Groups
from megamm.models.initialization import weight_drawer
from megamm.recipe import recipe_from_dict

Value = TypeVar("Value")
HEAD = 64  # width of an attention head
EYES = {"image_size": 112, "patch_size": 14, "width": 128, "num_layers": 4, "num_heads": 2, "mlp_width": 512}
SPAN = 64  # positions of an image


@dataclass(frozen=True)
class Shape:
    """A step: a LLaVA-style model, all but the encoder trained, and its batches."""

    layers: int = 4
    hidden: int = 256
    length: int = 256
    images: int = 1
    micro_batches: int = 1
    rows: int = 2
    steps: int = 2  # that are timed
    vocab: int = 1000

    @property
    def positions(self) -> int:
        """Of a row: those of its images come on top of the text where there are several."""
        return self.length + (self.images - 1) * SPAN


@dataclass(frozen=True)
class Sweep:
    """What is varied, over which values, and which exponents are expected of time and memory.

    Attributes:
        step: of the memory that comes and goes with a step.
        held: of weights, gradients and optimizer state; None where they stay as they are.
    """

    field: str
    values: list[int]
    time: tuple[float, float]
    step: tuple[float, float]
    held: tuple[float, float] | None = None
    base: Shape = field(default_factory=Shape)

    def shape(self, value: int) -> Shape:
        """The step at one value."""
        return replace(self.base, **{self.field: value})


LINEAR, UP_TO_SQUARE, NONE = (1.0, 1.0), (1.0, 2.0), (0.0, 0.0)
SHORT = Shape(layers=2, hidden=128, length=SPAN + 8, rows=8)  # so that images are most of the work
# (encoder, embedding and output layer do not grow along: at small sizes they make exponents smaller)
SWEEPS = {
    "layers": Sweep("layers", [2, 4, 8, 16], LINEAR, (0.5, 1.0), (0.7, 1.0)),
    "hidden size": Sweep("hidden", [128, 256, 512, 1024], UP_TO_SQUARE, (0.5, 2.0), UP_TO_SQUARE),
    "positions of a row": Sweep(
        "length", [512, 1024, 2048, 4096], UP_TO_SQUARE, UP_TO_SQUARE, None, Shape(rows=1)
    ),
    "images of a sample": Sweep("images", [1, 2, 4, 8], LINEAR, LINEAR, None, SHORT),
    "micro-batches": Sweep("micro_batches", [1, 2, 4, 8], LINEAR, NONE),
}


def recipe_of(shape: Shape) -> Recipe:
    """The stage that trains it, in fp32."""
    language = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_heads": max(1, shape.hidden // HEAD),
        "ffn_hidden_size": 8 * shape.hidden // 3 // 8 * 8,
        "vocab_size": shape.vocab,
        "max_positions": shape.positions,
    }
    return recipe_from_dict(
        {
            "name": "benchmark",
            "run_dir": "unused",
            "tokenizer": "unused",
            "model": {"assembly": "merged", "language": language, "vision": EYES},
            "data": {"sequence_length": shape.positions, "max_images": shape.images},
            "training": {
                "global_batch_size": shape.rows * shape.micro_batches,
                "micro_batch_size": shape.rows,
                "precision": "fp32",
                "freeze": ["vision"],
            },
            "parallel": {"backend": "local"},
        }
    )


def batches_of(shape: Shape) -> list[Batch]:
    """Rows full of images and text, all text learnt."""
    draw, found = np.random.default_rng(0), []
    for _ in range(shape.micro_batches):
        count = shape.positions - shape.images * (SPAN - 1)
        ids = draw.integers(IMAGE_ID + 1, shape.vocab, (shape.rows, count))
        ids[:, : shape.images] = IMAGE_ID
        samples = [(row, row != IMAGE_ID) for row in ids]
        found.append(
            batch_of(samples, SPAN, pixels_of(samples, EYES["image_size"]), EYES["image_size"], None)
        )
    return found


@dataclass(frozen=True)
class Cost:
    """Seconds of a step (median); bytes that are there between steps, and that come and go with one."""

    seconds: float
    held: int
    step: int


def measure(shape: Shape, threads: int) -> Cost:
    """The cost of a step in this process, without what libraries take for themselves."""
    torch.set_num_threads(threads)
    layout = groups.initialize(recipe_of(shape).parallel, torch.device("cpu"), "gloo")
    trainer(Shape(1, 64, SPAN + 8, rows=1), layout)()  # loads whatever is loaded when it is needed
    before = memory("VmRSS")
    step = trainer(shape, layout)
    step()
    held = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    times = [seconds_of(step) for _ in range(shape.steps)]
    most = memory("VmHWM", trim=False)
    groups.shutdown()
    return Cost(statistics.median(times), held - before, most - held)


def trainer(shape: Shape, layout: Groups) -> Callable[[], object]:
    """Takes a step on the same batches whenever it is called."""
    recipe = recipe_of(shape)
    ours, batches = Ours(recipe, layout, weight_drawer(recipe.model, 1), IMAGE_ID), batches_of(shape)
    return lambda: ours.step(batches)


def memory(field: str, trim: bool = True) -> int:
    """Bytes that /proc says of this process, after what is free was given back."""
    if trim:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def apart(function: Callable[..., Value], *arguments: Any) -> Value:
    """What the function returns in a fork of this process, which must not have run threads.

    Raises:
        RuntimeError: the fork ended without an answer.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        found: Value = here.recv()
    except EOFError:
        process.join()
        name = getattr(function, "__name__", "the function")
        raise RuntimeError(f"{name} ended with {process.exitcode}; its error is above") from None
    process.join()
    return found


def _answer(there: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    there.send(function(*arguments))
    there.close()
