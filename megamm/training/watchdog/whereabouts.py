"""What this rank is doing: written by the training loop, read by the watchdog's thread."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from types import FrameType

import torch

from megamm.batch import Batch

# Work of a step, whose length is known from the steps before; everything else takes as long as it takes.
STEP_PHASES = ("forward and backward", "update")
NUM_STEPS = 20  # of which the longest is remembered
# Innermost frames of a thread that waits for other ranks.
_WAITING = ("/torch/distributed/", "/megatron/core/pipeline_parallel/p2p_communication.py")


class Whereabouts:
    """Where the training loop is. The loop's thread alone writes.

    Attributes:
        mirror: descriptor of a file that always holds this, as JSON, for other processes to read when this
            one can no longer be asked; -1: none.
        step: that is being done, from 1.
        phase: of it.
        micro_batch: that was taken last, from 1; 0: none yet.
        samples: dataset indices of the samples of each micro-batch, on ranks that read data.
        since: when it came there (time.monotonic).
    """

    def __init__(self) -> None:
        self.step, self.phase, self.micro_batch = 0, "start", 0
        self.samples: list[list[int]] = []
        self._spelled: tuple[list[list[int]], str] = ([], "[]")
        self.mirror = -1
        self.since = time.monotonic()
        self._main_thread = threading.get_ident()
        self._modules: dict[int, str] = {}
        self._step_started: float | None = None
        self._step_seconds: deque[float] = deque(maxlen=NUM_STEPS)

    def at(self, phase: str) -> None:
        """The loop begins with a phase."""
        now = time.monotonic()
        if self._step_started is not None and phase not in STEP_PHASES:
            self._step_seconds.append(now - self._step_started)
            self._step_started = None
        elif self._step_started is None and phase in STEP_PHASES:
            self._step_started = now
        self.phase, self.micro_batch, self.since = phase, 0, now
        self._write_mirror()

    def begin_step(self, step: int) -> None:
        """The loop begins with a step, by waiting for its data."""
        self.step, self.samples = step, []
        self.at("data")

    def take(self, micro_batch: int) -> None:
        """The loop takes a micro-batch, by its number from 1."""
        self.micro_batch, self.since = micro_batch, time.monotonic()
        self._write_mirror()

    def _write_mirror(self) -> None:
        if self.mirror >= 0:
            if self._spelled[0] is not self.samples:  # once a step: there may be thousands
                self._spelled = self.samples, json.dumps(self.samples)
            text = f"[{self.step}, {json.dumps(self.phase)}, {self.micro_batch}, {self._spelled[1]}]\n"
            os.pwrite(self.mirror, text.encode(), 0)  # what stands behind the line is of a longer one before

    def know_modules(self, models: Iterable[torch.nn.Module]) -> None:
        """Take note of the names of a model's modules, so that code that runs in one is named after it."""
        self._modules = {id(module): name for model in models for name, module in model.named_modules()}

    def place(self) -> str:
        """Where the loop is, in a few words."""
        return f"step {self.step}, {self.phase}" if self.step else "at the start"

    @property
    def longest_step(self) -> float | None:
        """Seconds of work of the longest of the last steps; None before there were enough to judge by."""
        known = list(self._step_seconds)
        return max(known) if len(known) >= NUM_STEPS // 4 else None

    def code(self, with_module: bool = False) -> tuple[str, bool]:
        """The code that the loop's thread runs at this moment, in words: the collective it waits in, the
        function that called it; and whether it waits for other ranks.

        Args:
            with_module: also the module whose code it is. Looking for it keeps the variables of all functions
                alive until they return, so it is for a process that is about to end.
        """
        frame = sys._current_frames().get(self._main_thread)
        if frame is None:
            return "ended", False
        is_waiting = _waits(frame)
        where = _function_of(frame)
        if with_module and (module := self._module_of(frame)):
            where = f"{module}, {where}"
        return (f"{_collective_of(frame)}, called by {where}" if is_waiting else where), is_waiting

    def mark(self) -> object:
        """Something that changes whenever the loop gets further. Within a step that is what the loop has
        noted; around it (data, checkpoints, validation), which may take as long as they like in many calls,
        it is also where the thread stands."""
        noted = (self.step, self.phase, self.since)
        if self.phase in STEP_PHASES:
            return noted
        frame = sys._current_frames().get(self._main_thread)
        return (*noted, id(frame), frame.f_lasti if frame is not None else 0)

    def is_waiting(self) -> bool:
        """Whether the loop's thread waits for other ranks at this moment."""
        frame = sys._current_frames().get(self._main_thread)
        return frame is not None and _waits(frame)

    def _module_of(self, frame: FrameType | None) -> str | None:
        while frame is not None:
            name = self._modules.get(id(frame.f_locals.get("self")))
            if name:
                return name
            frame = frame.f_back
        return None


class WatchedBatches(list[Batch]):
    """The micro-batches of a step; whoever takes one is noted."""

    def __init__(self, batches: list[Batch], here: Whereabouts) -> None:
        super().__init__(batches)
        self._here = here

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(super().__iter__(), 1):
            self._here.take(number)
            yield batch


def _waits(frame: FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in _WAITING)


def _collective_of(frame: FrameType) -> str:
    """The function of torch.distributed (or of megatron's send and receive) that was called."""
    name = frame.f_code.co_name
    outer: FrameType | None = frame
    while outer is not None and _waits(outer):
        if outer.f_code.co_name != "wrapper":  # torch's log of calls
            name = outer.f_code.co_name
        outer = outer.f_back
    return name


def _function_of(frame: FrameType) -> str:
    """The innermost function of megamm or megatron, and where it is."""
    innermost: FrameType | None = frame
    while innermost is not None:
        path = innermost.f_code.co_filename
        for package in ("/megamm/", "/megatron/"):
            if package in path:
                place = f"{package[1:]}{path.rpartition(package)[2]}"
                return f"{innermost.f_code.co_name} ({place}:{innermost.f_lineno})"
        innermost = innermost.f_back
    return f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})"
