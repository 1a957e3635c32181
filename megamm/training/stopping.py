"""Stopping when the scheduler asks: all ranks after the same step, with a checkpoint.

A scheduler tells whom it likes: one process, all of them, at slightly different times. So a signal only
leaves a mark, and after each step the ranks agree whether any of them has one.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

STOPPED = 75  # exit code of a run that was asked to stop: EX_TEMPFAIL, "try again later"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Listens for SIGTERM and SIGUSR1 while the context is open (in the main thread alone; elsewhere Python
    allows no handlers, and none are set). A second signal of the same kind acts as if nobody listened: it
    ends the process.

    Args:
        device: of this rank, for the agreement.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = 0  # number of the signal
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, objection: int = 0) -> tuple[str | None, int]:
        """What the ranks agree on before an update, the same on every rank (collective): the name of a signal
        that any of them has received, or None; and the greatest of their objections to the update."""
        numbers = [self._received, objection]
        if dist.get_world_size() > 1:
            message = torch.tensor(numbers, device=self._device)
            dist.all_reduce(message, dist.ReduceOp.MAX)
            numbers = message.tolist()
        return signal.Signals(numbers[0]).name if numbers[0] else None, numbers[1]

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)
