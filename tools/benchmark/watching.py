#!/usr/bin/env python
"""What it costs to watch a run: the time of a step with all that looks for faults, and without.

    python tools/benchmark/watching.py [--rounds 12]

One side takes steps as megatron-core's own loop would: gradients cleared, forward, backward, update. The
other takes them as `megamm train` does: it notes where it is, gives signs of life, measures its own work,
judges loss and gradients, agrees with the other ranks on signals and on the update. They take turns, five
steps each, on the same weights; both must end with the same bits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import ROOT, Result, Table, add_json, load, machine
from frozen_parts import Side, recipe_of

from megamm.engine import groups
from megamm.engine.optimizer import build_optimizer, build_schedule
from megamm.engine.pipeline import forward_backward
from megamm.parity.processes import run_processes
from megamm.training.anomalies import AnomalyPolicy
from megamm.training.heartbeat import Heartbeats
from megamm.training.loop import WINDOW, Watchers, train_step
from megamm.training.stopping import StopRequests
from megamm.training.watchdog import Watchdog, Whereabouts
from megamm.training.watchdog.slow_ranks import SlowRanks, WorkMeter

STEPS = 5  # of a turn
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "1 process": (1, {}),
    "2 processes, tensor parallel": (2, {"parallel.tensor": 2}),
    "2 processes, data parallel": (2, {}),
}


class Training(Side):
    """A model with its optimizer, trained with and without watchers."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self.recipe = recipe_of("merged", **overrides)
        layout = groups.initialize(self.recipe.parallel, torch.device("cpu"), "gloo")
        super().__init__(self.recipe, layout, 0.4)
        self.groups = layout
        self.optimizer = build_optimizer(self.wrapped, self.recipe, layout)
        self.schedule = build_schedule(self.optimizer, self.recipe.optimizer, 10_000)
        self.batches = self.batches[: len(self.batches) // layout.dp_size]
        # no save is under way, for which an update would have to wait
        self.checkpoints = SimpleNamespace(before_update=lambda: None)
        self.policy, self.done = AnomalyPolicy(self.recipe.anomalies), 0

    def bare(self) -> float:
        """Seconds of each of STEPS steps without any of it."""
        started = time.perf_counter()
        for _ in range(STEPS):
            for model in self.wrapped:
                model.zero_grad_buffer()
            self.optimizer.zero_grad()
            forward_backward(self.wrapped, self.batches, self.layout)
            self.optimizer.step()
            self.schedule.step(1)
        return (time.perf_counter() - started) / STEPS

    def watched(self) -> float:
        """Seconds of each of STEPS steps as in `megamm train`, from when the watchers look."""
        here = Whereabouts()
        here.know_modules(self.models)
        with ExitStack() as stack:
            requests = stack.enter_context(StopRequests())
            requests.listen(self.layout.device)
            stack.enter_context(Watchdog(self.recipe, self.layout, here))
            meter = stack.enter_context(WorkMeter(here))
            slow_ranks = SlowRanks(meter, self.layout, 3.0)
            watchers = Watchers(requests, stack.enter_context(Heartbeats({})), here, meter)
            started = time.perf_counter()
            for _ in range(STEPS):
                self.done += 1
                here.begin_step(self.done)
                result = train_step(self, self.batches, 0, self.policy, watchers)  # type: ignore[arg-type]
                assert not result.objection
                self.policy.updated(result.loss, 0)
                here.at("log")
                if self.done % WINDOW == 0:
                    slow_ranks.find()
            return (time.perf_counter() - started) / STEPS


def compare(rounds: int, threads: int, overrides: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of a step of every turn, with and without, after both were found to compute the same."""
    torch.set_num_threads(threads)
    one, other = Training(overrides), Training(overrides)
    one.bare()
    other.watched()
    for (name, a), (_, b) in zip(
        one.models[0].named_parameters(), other.models[0].named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    turns = [(other.watched(), other.bare()) for _ in range(rounds)]
    groups.shutdown()
    return [with_it for with_it, _ in turns], [without for _, without in turns]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="turns of each side (median)")
    add_json(parser)
    args_of = parser.parse_args()
    rounds = args_of.rounds
    columns = ["layout", "ms per step", "without", "ratio", "of neighbouring turns", "quartiles"]
    result = Result(f"{machine()}; median of {rounds}; load {load()}", [Table("", columns)])
    for name, (processes, overrides) in LAYOUTS.items():
        args = {"rounds": rounds, "threads": 2 // processes, "overrides": overrides}
        with tempfile.TemporaryDirectory() as folder:
            path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
            env = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(2 // processes)}
            files = run_processes(processes, "watching:compare", args, Path(folder), 1200, env)
            watched, bare = torch.load(files[0], weights_only=True)
        ratios = [a / b for a, b in zip(watched, bare, strict=True)]
        with_it, without = statistics.median(watched), statistics.median(bare)
        low, middle, high = statistics.quantiles(ratios)
        print(
            f"{name}: {with_it * 1e3:.1f} ms, without {without * 1e3:.1f} ms, ratio {with_it / without:.3f} "
            f"(of neighbouring turns {middle:.3f}, quartiles {low:.3f} to {high:.3f})",
            flush=True,
        )
        pair = (f"{value * 1e3:.1f}" for value in (with_it, without))
        quartiles = f"{low:.3f} to {high:.3f}"
        result.tables[0].add(name, *pair, f"{with_it / without:.3f}", f"{middle:.3f}", quartiles)
    result.write(args_of.json)


if __name__ == "__main__":
    main()
