"""Which rank the others wait for: how long each works between the collectives, and who works the longest.

A thread looks twenty times a second at what the training loop's thread does: it waits for other ranks, or it
works. That costs nothing that could be measured, needs no change of any collective, and sees what makes a
process
slow on its host: a processor that is shared or throttled, memory that is swapped, a picture that takes long.
On GPUs the host runs ahead of the device, so a slow device is found by timing a product on it.
"""

from __future__ import annotations

import threading
import time
from statistics import median
from typing import NamedTuple

import torch

from megamm.device import product_seconds
from megamm.engine.ranks import gather
from megamm.training.watchdog.whereabouts import STEP_PHASES, Whereabouts

INTERVAL_S = 0.05
WAITING_SHARE = 0.5  # of a step that is lost to a slow rank, before it is worth a word


class WorkMeter:
    """How long the training loop has worked in its steps, without waiting for other ranks; while it is
    open."""

    def __init__(self, here: Whereabouts) -> None:
        self._here = here
        self._working, self._whole = 0.0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="work-meter", daemon=True)

    def __enter__(self) -> WorkMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def take(self) -> tuple[float, float]:
        """Seconds of work, and all seconds, of the steps since the last call."""
        taken = self._working, self._whole
        self._working, self._whole = 0.0, 0.0
        return taken

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(INTERVAL_S):
            now = time.monotonic()
            if self._here.phase in STEP_PHASES:
                self._whole += now - last
                # a process that got no time on its processor was at work, as far as the others are concerned
                was_held_up = now - last > 2 * INTERVAL_S
                self._working += now - last if was_held_up or not self._here.is_waiting() else 0.0
            last = now


def find_slow(meter: WorkMeter, stage: int, factor: float, device: torch.device) -> str | None:
    """Who was much slower than the others since the last call; the same on all ranks (collective).

    Args:
        stage: of the pipeline: ranks of one stage have the same work.
        factor: so many times as much work as the others is slow.
    """
    working, whole = meter.take()
    found = gather((stage, working, whole, product_seconds(device)))
    stages = [stage for stage, _, _, _ in found]
    wall = max(whole for _, _, whole, _ in found)
    slow = _outlier([working for _, working, _, _ in found], stages, factor)
    if slow is not None and slow.seconds - slow.usual > WAITING_SHARE * wall:
        return (
            f"rank {slow.rank} is slow: of {wall:.1f} s of training it worked {slow.seconds:.1f} s, where "
            f"others worked {slow.usual:.1f} s and waited for it"
        )
    products = [seconds for _, _, _, seconds in found]
    slow = _outlier(products, stages, factor) if None not in products else None
    if slow is not None:
        return (
            f"the GPU of rank {slow.rank} is slow: a matrix product takes it {1e3 * slow.seconds:.2f} ms and "
            f"others {1e3 * slow.usual:.2f} ms"
        )
    return None


class _Slow(NamedTuple):
    rank: int
    seconds: float
    usual: float


def _outlier(seconds: list[float], stages: list[int], factor: float) -> _Slow | None:
    """The rank that takes `factor` times as long as the median of the others of its stage or, where it is
    alone there, of all others; the slowest if there are several."""
    found = None
    for rank, own in enumerate(seconds):
        others = [n for n in range(len(seconds)) if n != rank]
        same = [n for n in others if stages[n] == stages[rank]]
        usual = median(seconds[n] for n in same or others) if others else own
        if own > factor * usual and (found is None or own > found.seconds):
            found = _Slow(rank, own, usual)
    return found
