"""Signs of life for ft_launcher, of NVIDIA's nvidia-resiliency-ext, which ends a rank that gives none for
too long, and starts all of them again. Without that launcher this does nothing, and imports nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megamm.errors import InputError

SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"  # where ft_launcher's monitor of this rank listens
_LONGEST_PAUSE_S = 10.0


class Heartbeats:
    """The link to the monitor of this rank, from here to the end of the context.

    The launcher's --ft-initial-rank-heartbeat-timeout is the time from here to the first beat (building the
    model, loading a checkpoint, the first step), --ft-rank-heartbeat-timeout that between two steps.

    Args:
        environment: of this process.
    Raises:
        InputError: started by ft_launcher, with another Python than the one that has its package.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._client: Any = None
        self._has_beaten = False
        if SOCKET in environment:
            self._begin()

    def __enter__(self) -> Heartbeats:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def beat(self) -> None:
        """A step is done. That the monitor has gone is for its launcher to answer, not for the run."""
        if self._client is None:
            return
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClientError

        try:
            self._client.send_heartbeat()
            self._has_beaten = True
        except RankMonitorClientError:
            self._end()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody waits for a step meanwhile: for what has none, and lasts as long as it lasts. A thread
        beats; closing the link would mean to the monitor that the rank is being restarted."""
        over = threading.Event()
        beater = threading.Thread(target=self._beat_until, args=(over,), daemon=True)
        if self._has_beaten:  # before that the longer time of the start is allowed
            beater.start()
        try:
            yield
        finally:
            over.set()
            if beater.is_alive():
                beater.join()

    def _beat_until(self, over: threading.Event) -> None:
        while self._client is not None:
            self.beat()
            timeout = self._client.hb_timeouts.subsequent if self._client is not None else None
            if over.wait(_LONGEST_PAUSE_S if timeout is None else min(timeout / 4, _LONGEST_PAUSE_S)):
                return

    def _begin(self) -> None:
        try:
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
        except ImportError as error:
            raise InputError(
                f"ft_launcher: its package nvidia-resiliency-ext cannot be imported by megamm ({error}); pip "
                "install 'megamm[ft]' into the environment of megamm, or start with torchrun"
            ) from None
        self._client = RankMonitorClient()
        self._client.init_workload_monitoring()

    def _end(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.shutdown_workload_monitoring()
