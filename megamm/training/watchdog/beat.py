"""Signs of life: what a rank tells the others of itself, through the store that the launcher or rank 0 keeps.

The store is asked through a connection of its own, so that no answer has to wait for what the training thread
asks, and with keys of its own for each start of the ranks.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

PATIENCE = timedelta(seconds=5)  # for an answer of the store


@dataclass(frozen=True)
class Beat:
    """One sign of life of one rank.

    Attributes:
        rank, host, pid: whose. leader: the rank that reads data for its copy of the model.
        number: of the sign, from 1; it grows as long as the process lives.
        step, phase, micro_batch, samples: as in Whereabouts.
        seconds: since the training loop got further.
        code: that it runs. is_waiting: for other ranks.
        whereabouts, stacks: descriptors of its OpenBook.
        has_left: it has nothing more to do.
        is_exact: it was silent, and this was read from its OpenBook.
    """

    rank: int
    host: str
    pid: int
    leader: int
    number: int = 0
    step: int = 0
    phase: str = "start"
    micro_batch: int = 0
    samples: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    code: str = ""
    is_waiting: bool = False
    whereabouts: int = -1
    stacks: int = -1
    has_left: bool = False
    is_exact: bool = False

    def heading(self) -> str:
        """All of it in a line for people."""
        return (
            f"rank {self.rank}, process {self.pid} on {self.host}: {self.phase} of step {self.step}, "
            f"micro-batch {self.micro_batch}; {self.code}; samples {self.samples}"
        )


@dataclass(frozen=True)
class Alarm:
    """Why a run ends: the first one counts.

    Attributes:
        rank: that raised it.
        silent: rank that gave no sign of life; None: `rank` itself gets no further.
        seconds: for so long.
        folder: name of the folder for the stacks.
    """

    rank: int
    silent: int | None
    seconds: float
    folder: str


class Board:
    """Where ranks leave their signs of life. May be used by one thread.

    Every method raises RuntimeError (torch's DistError) if the store does not answer in time.
    """

    def __init__(self, world_size: int) -> None:
        self._size = world_size
        self._store: dist.Store | None = None
        if world_size > 1:
            self._store = dist.PrefixStore("megamm/watchdog", _get_default_store().clone())  # type: ignore[attr-defined]
            self._store.set_timeout(PATIENCE)

    def put(self, beat: Beat) -> None:
        """Leave a sign of life."""
        if self._store is not None:
            self._store.set(f"beat/{beat.rank}", json.dumps(asdict(beat)))

    def get(self, rank: int) -> Beat | None:
        """The last sign of life of a rank, if there was any."""
        key = f"beat/{rank}"
        if self._store is None or not self._store.check([key]):
            return None
        return Beat(**json.loads(self._store.get(key)))

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """Raise an alarm; returns the first that was raised."""
        if self._store is None:
            return alarm
        first = self._store.compare_set("alarm", "", json.dumps(asdict(alarm)))
        return Alarm(**json.loads(first))

    def alarm(self) -> Alarm | None:
        """The alarm that was raised, if any."""
        if self._store is None or not self._store.check(["alarm"]):
            return None
        return Alarm(**json.loads(self._store.get("alarm")))

    def answer(self, beat: Beat) -> None:
        """Answer an alarm with the last sign of life."""
        if self._store is not None:
            self._store.set(f"answer/{beat.rank}", json.dumps(asdict(beat)))

    def answers(self) -> dict[int, Beat]:
        """The answers so far, by rank."""
        if self._store is None:
            return {}
        keys = {rank: f"answer/{rank}" for rank in range(self._size)}
        there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: Beat(**json.loads(self._store.get(key))) for rank, key in there.items()}


def host_of_store() -> bool:
    """Whether this process keeps the store, as rank 0 does where no torchrun does."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
