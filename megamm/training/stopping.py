"""Stopping when the scheduler asks: all ranks after the same step, with a checkpoint.

A scheduler tells whom it likes: one process, all of them, at slightly different times. So a signal only
leaves a mark, and in each step the ranks agree whether any of them has one.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from megamm.engine import groups
from megamm.engine.ranks import lost_rank
from megamm.errors import STOPPED, RankLost
from megamm.training.watchdog.whereabouts import Whereabouts

__all__ = ["GRACE_S", "SIGNALS", "STOPPED", "StopRequests", "until_a_rank_is_lost"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Signals that come so soon after the first are the same request: schedulers signal launchers and ranks,
# launchers signal ranks, and each has its own pace.
GRACE_S = 5.0


class StopRequests:
    """Listens for SIGTERM and SIGUSR1 from `listen` to the end of the context (in the main thread alone;
    elsewhere Python allows no handlers, and none are set). A signal that comes more than GRACE_S seconds
    after the first one ends the process at once, as if nobody listened.

    When the ranks have agreed to stop, signals mean nothing any more behind the context: a launcher that sees
    the first rank end signals the others, which are on their way out.
    """

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._received = 0  # number of the first signal
        self._since = 0.0  # when it came
        self._is_agreed = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self._is_agreed else handler)  # type: ignore[arg-type]
        self._before = {}

    def listen(self, device: torch.device) -> None:
        """From here on a signal waits for the next agreement, so the ranks must have met.

        Args:
            device: of this rank, for the agreement.
        """
        self._device = device
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def agreed(self, objection: int = 0) -> tuple[str | None, int]:
        """What the ranks agree on, the same on every rank (collective): the name of a signal that any of them
        has received, or None; and the greatest of their objections to the update that is due."""
        numbers = [self._received, objection]
        if dist.get_world_size() > 1:
            message = torch.tensor(numbers, device=self._device)
            dist.all_reduce(message, dist.ReduceOp.MAX)
            numbers = message.tolist()
        self._is_agreed = numbers[0] != 0
        return signal.Signals(numbers[0]).name if numbers[0] else None, numbers[1]

    @property
    def is_asked(self) -> bool:
        """Whether this rank has received a signal."""
        return self._received != 0

    def _remember(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received, self._since = number, now
        elif now - self._since > GRACE_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def until_a_rank_is_lost(here: Whereabouts, stop_requests: StopRequests) -> Iterator[None]:
    """Leaves the process group at the end, and has the failure of a collective say in a sentence what it
    means.

    Args:
        here: where the run stands.
        stop_requests: of this rank: a launcher that knows of the loss has asked it to end.
    Raises:
        RankLost: another rank has died or does not answer. The group is not left then, as that would wait
            for it.
    """
    lost = False
    try:
        yield
    except RankLost:
        lost = True
        raise
    except RuntimeError as error:
        found = lost_rank(error, here.place(), stop_requests.is_asked)
        if found is None:
            raise
        lost = True
        raise found from error
    finally:
        if not lost:
            groups.shutdown()
