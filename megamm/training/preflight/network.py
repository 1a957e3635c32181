"""Whether all processes of a run answer each other, in the world and in every group."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megamm.engine.groups import Groups
from megamm.errors import RankLost
from megamm.training.preflight.found import Found

PATIENCE_S = (
    120.0  # the first collective of a large world builds its connections, which takes tens of seconds
)
_GROUPS = ("tp", "pp", "cp", "dp", "dp_cp", "mp")
_MOST_NAMED = 8  # ranks


def check_network(layout: Groups, timeout_s: float) -> Found:
    """A small sum over the world and over each group of this rank, with a result that is known (collective).

    Args:
        layout: the groups.
        timeout_s: parallel.timeout_s; not more than PATIENCE_S is waited.
    Raises:
        RankLost: a sum did not come in time; names the ranks that did not come to it, where that can be told.
    """
    deadline = time.monotonic() + min(timeout_s, PATIENCE_S)
    found = Found()
    named = {"world": dist.group.WORLD} | {name: getattr(layout.collection, name) for name in _GROUPS}
    for name, group in named.items():
        if group is None or group.size() == 1:
            continue
        ranks = dist.get_process_group_ranks(group)
        total = _sum(name, group, ranks, layout.device, deadline)
        if total != sum(rank + 1 for rank in ranks):
            found.problems.append(
                f"the sum over the {_called(name)} of rank {dist.get_rank()} came out wrong ({total} instead "
                f"of {sum(rank + 1 for rank in ranks)}); check the network and the drivers of its nodes"
            )
    return found


def _sum(name: str, group: Any, ranks: list[int], device: torch.device, deadline: float) -> int:
    """What an all-reduce of every rank's number (from 1) gives."""
    me, store = dist.get_rank(), _get_default_store()
    store.set(_key("came", name, me), "1")
    number = torch.tensor([me + 1], dtype=torch.int64, device=device)
    try:
        work = dist.all_reduce(number, group=group, async_op=True)
        assert work is not None
        work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        total = int(number.item())
    except RuntimeError as error:  # what backends raise for a timeout or a lost connection
        raise RankLost(
            f"preflight.network: the {_called(name)} of rank {me} ({len(ranks)} processes) gave no sum in "
            f"time: {_suspects(store, name, ranks)}; look into the logs of these ranks and at the network, "
            "or set preflight.network=off"
        ) from error
    store.set(_key("went", name, me), "1")
    return total


def _suspects(store: Any, name: str, ranks: list[int]) -> str:
    """The ranks that never came; if all came, those that did not get a result either."""
    try:
        late = [rank for rank in ranks if not store.check([_key("came", name, rank)])]
        stuck = [rank for rank in ranks if not store.check([_key("went", name, rank)])]
    except RuntimeError:  # the process that keeps the store is gone
        return "rank 0 is gone"
    if late:
        return f"{_listed(late)} did not come to it"
    return f"all came to it, and {_listed(stuck)} got no result"


def _listed(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _MOST_NAMED} more" if len(ranks) > _MOST_NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MOST_NAMED]))}{more}"


def _key(what: str, name: str, rank: int) -> str:
    return f"megamm/preflight/{what}/{name}/{rank}"


def _called(name: str) -> str:
    words = {"tp": "tensor", "pp": "pipeline", "cp": "context", "dp": "data", "dp_cp": "data and context"}
    if name in words:
        return f"{words[name]}-parallel group"
    return "world" if name == "world" else "copy of the model"
