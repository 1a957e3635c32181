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

import torch.distributed as dist

from megamm.device import product_seconds
from megamm.engine.groups import Groups
from megamm.engine.ranks import gather
from megamm.training.watchdog.whereabouts import STEP_PHASES, Whereabouts

INTERVAL_S = 0.05
MIN_WINDOW_S = 5.0  # of steps: less is no measure
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

    def read(self) -> tuple[float, float]:
        """Seconds of work, and all seconds, of the steps since `restart`."""
        return self._working, self._whole

    def restart(self) -> None:
        """Count from here on."""
        self._working, self._whole = 0.0, 0.0

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


class SlowRanks:
    """Looks for ranks that are much slower than others in their place, in one window of training after the
    other.

    A moment's slowness is nobody's business: a rank is named if it is the slow one of two windows in a row.
    """

    def __init__(self, meter: WorkMeter, layout: Groups, factor: float) -> None:
        """
        Args:
            factor: so many times as much work as the others is slow; 0: never.
        """
        self._meter, self._layout, self._factor = meter, layout, factor
        self._suspect: int | None = None

    def find(self) -> str | None:
        """Who is slow, in a sentence; None if nobody is, or the window is not over. The same on all ranks
        (collective)."""
        if not self._factor or dist.get_world_size() == 1:
            return None
        # ranks of one pipeline stage have the same work
        found = gather((self._layout.pp_rank, *self._meter.read(), product_seconds(self._layout.device)))
        stages, working, whole, products = (list(column) for column in zip(*found, strict=True))
        if max(whole) < MIN_WINDOW_S:
            return None
        self._meter.restart()
        slow, sentence = _outlier(working, stages, self._factor), None
        if slow is not None and slow.seconds - slow.usual > WAITING_SHARE * max(whole):
            sentence = (
                f"rank {slow.rank} is slow: of {max(whole):.1f} s of training it worked {slow.seconds:.1f} "
                f"s, where others worked {slow.usual:.1f} s and waited for it"
            )
        else:
            slow = _outlier(products, stages, self._factor) if None not in products else None
            sentence = slow and (
                f"the GPU of rank {slow.rank} is slow: a matrix product takes it {1e3 * slow.seconds:.2f} "
                f"ms and others {1e3 * slow.usual:.2f} ms"
            )
        before, self._suspect = self._suspect, slow and slow.rank
        return sentence if slow is not None and slow.rank == before else None


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
