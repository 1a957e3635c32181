"""What the ranks of a run do together around files: exchange objects, let one rank act for all."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megamm.errors import MegammError, RankLost, RunError

# What the backends say, in RuntimeErrors without a class of their own, when a process they talk to has gone.
_BACKENDS = ("gloo/transport", "NCCL", "TCPStore")
_USAGE = ("invalid usage", "invalid argument")  # NCCL's words for a mistake of this process's own


def gather(value: Any) -> list[Any]:
    """The `value` of every rank, by rank (collective)."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_on_rank_0(value: Any) -> list[Any] | None:
    """The `value` of every rank, by rank, on rank 0; None elsewhere (collective)."""
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered


def on_rank_0(action: Callable[[], Any], failure: str) -> Any:
    """Run `action` on rank 0 (collective); what it returns, which must be small, is returned everywhere.

    Raises:
        RunError: the action raised an OSError or a MegammError; on every rank, instead of the others waiting.
    """
    outcome: tuple[Any, str | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except (OSError, MegammError) as error:
            outcome = (None, describe(error))
    result, error_text = gather(outcome)[0]
    if error_text is not None:
        raise RunError(f"{failure} ({error_text}); free space or fix the permissions")
    return result


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on every rank (collective).

    Raises:
        MegammError: `make` raised it; on every rank. Anything else is raised as it is on rank 0, and in words
            elsewhere.
    """
    told: list[Any] = [None, None]
    unexpected: Exception | None = None
    if dist.get_rank() == 0:
        try:
            told[1] = make()
        except MegammError as error:
            told[0] = error
        except Exception as error:
            unexpected, told[0] = error, MegammError(f"rank 0: {type(error).__name__}: {error}")
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise unexpected or told[0]
    return told[1]


def lost_rank(error: RuntimeError, where: str, is_known: bool) -> RankLost | None:
    """The error for users behind a collective that failed because another rank has died or does not answer;
    None if `error` is something else.

    Args:
        where: the run stood ("step 7").
        is_known: as in RankLost.
    """
    words = str(error)
    if not (isinstance(error, dist.DistError) or any(name in words for name in _BACKENDS)):
        return None
    if any(usage in words.lower() for usage in _USAGE):
        return None
    return RankLost(
        f"{where}: another rank has died or does not answer ({_plain(words)}); its own output or the "
        "launcher's says why; started again, the run goes on from its last checkpoint",
        is_known,
    )


def _plain(words: str) -> str:
    """The first sentence of a backend's error, without the places in its source."""
    line = (words.strip().splitlines() or ["no reason given"])[0]
    return re.sub(r"\[/[^\]]*\] *", "", line).partition(". ")[0][:200]


def describe(error: BaseException) -> str:
    """An error in a few words; the operating system's where one lies at its root (torch wraps them)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.strerror or str(seen)
        seen = seen.__cause__ or seen.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
