"""What the ranks of an evaluation tell each other: rank 0 what is answered already, each rank that it has
finished or failed.

They talk through the launcher's store, not by collectives: copies of a model finish hours apart, and a
collective would time out, or wait for a rank that has failed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megamm.engine.ranks import from_rank_0, lost_rank
from megamm.errors import RankLost, RunError

_POLL_S = 0.2
_KEY = "megamm/evaluate"


def num_ranks() -> int:
    """Ranks of this evaluation."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def told_by_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on every rank; also what it raises (collective)."""
    if num_ranks() == 1:
        return make()
    return from_rank_0(make)


@contextmanager
def together(finish: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs its block on every rank, then `finish` on rank 0 when all have come to the end of it.

    Gives a list into which `finish` puts what it returned, on rank 0.
    Raises:
        RunError: another rank has failed; it has said why itself.
        RankLost: rank 0 has gone.
    """
    results: list[Any] = []
    if num_ranks() == 1:
        yield results
        results.append(finish())
        return
    store = _store()
    try:
        yield results
        store.set(f"done/{rank()}", "")
        if rank() == 0:
            _wait(store, [f"done/{number}" for number in range(num_ranks())])
            results.append(finish())
            store.set("finished", "")
            _wait(store, [f"left/{number}" for number in range(1, num_ranks())])
        else:
            _wait(store, ["finished"])
            store.set(f"left/{rank()}", "")
    except BaseException as error:
        _tell(store, error)
        if isinstance(error, RuntimeError) and lost_rank(error, "evaluation", is_known=False):
            raise _lost(error) from None
        raise


def _store() -> dist.Store:
    from torch.distributed.distributed_c10d import _get_default_store

    return dist.PrefixStore(_KEY, _get_default_store())


def _tell(store: dist.Store, error: BaseException) -> None:
    """Leave word for those who wait; they may have gone."""
    try:
        if not store.check(["failed"]):
            store.set("failed", f"rank {rank()}: {error or type(error).__name__}"[:1000])
    except (RuntimeError, OSError):
        return


def _wait(store: dist.Store, keys: list[str]) -> None:
    """Wait until all keys are there.

    Raises:
        RunError: a rank has failed. RankLost: the one that holds the store has gone.
    """
    try:
        while keys and not store.check(keys):
            if store.check(["failed"]):
                raise RunError(
                    f"{store.get('failed').decode('utf-8', 'replace')}; started again, the "
                    "evaluation goes on from the answers that were written"
                )
            time.sleep(_POLL_S)
    except (dist.DistError, ConnectionError) as error:
        raise _lost(error) from None


def _lost(error: Exception) -> RankLost:
    words = (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
    return RankLost(
        f"another rank has died or does not answer ({words}); its own output or the launcher's says why; "
        "started again, the evaluation goes on from the answers that were written"
    )
