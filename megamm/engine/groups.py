"""Process groups: built once from the recipe's layout, then passed on explicitly."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megamm.config import ParallelConfig
from megamm.errors import InputError, RankLost


@dataclass(frozen=True)
class Groups:
    """This process in the layout of the run.

    Attributes:
        collection: megatron-core's process groups (tp, pp, dp, dp_cp, mp, embd, ...).
        device: where this process computes.
        tp_rank, tp_size, pp_rank, pp_size, dp_rank, dp_size: coordinates and extents.
    """

    collection: ProcessGroupCollection
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_model_leader(self) -> bool:
        """Whether this rank reads the data for its copy of the model."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def model_leader(self) -> int:
        """Global rank of the data reader of this rank's copy of the model."""
        return dist.get_global_rank(self.collection.mp, 0)


def world_size() -> int:
    """Processes of the run as the launcher announces them (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(parallel: ParallelConfig, device: torch.device, backend: str) -> Groups:
    """Join the process group and build the model-parallel groups.

    Args:
        parallel: group sizes; data parallelism takes what is left of the world.
        device: of this process.
        backend: torch.distributed backend ("nccl" or "gloo").
    Raises:
        InputError: the world is not a multiple of tensor x pipeline.
        RankLost: not all ranks have come in time.
    """
    world = world_size()
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world % model_size:
        raise InputError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context {parallel.context} "
            f"needs a multiple of {model_size} processes, but {world} were started; start more (torchrun "
            f"--nproc-per-node {model_size}) or lower the layout"
        )
    # tensor-parallel overlap relies on kernels starting in the order they are queued
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not dist.is_initialized():
        timeout = datetime.timedelta(seconds=parallel.timeout_s)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(backend, timeout=timeout, **_of_this_attempt(timeout))
        elif "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:  # a single process without a launcher
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if parallel_state.model_parallel_is_initialized():
        return _reuse(parallel, device)
    _build(parallel)
    return current(device)


def _of_this_attempt(timeout: datetime.timedelta) -> dict[str, Any]:
    """Where the ranks that torchrun has started together meet.

    Its store outlives them: after a restart it still holds what the dead ranks have written, by which gloo
    finds addresses that nobody listens at, and NCCL an old world. So the ranks of an attempt use a part of
    their own. Neither the number of restarts nor anything else that torchrun tells them is the same on all
    nodes.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    attempt = meet(store, rank, world, timeout.total_seconds())
    return {"store": dist.PrefixStore(f"megamm/{attempt}", store), "rank": rank, "world_size": world}


def meet(store: dist.Store, rank: int, world: int, timeout_s: float) -> str:
    """A word that all ranks of this attempt have in common and no other attempt has. Rank 0 makes it up and
    keeps it in the store; who finds one there greets rank 0 under it with a word of its own, and believes in
    it when that is answered, which a dead rank 0 cannot.

    Raises:
        RankLost: not all ranks have come in time.
    """
    mine, deadline, pause = uuid.uuid4().hex, time.monotonic() + timeout_s, 0.01
    if rank == 0:
        store.set(_ATTEMPT, mine)
    while True:
        found = mine if rank == 0 else store.get(_ATTEMPT).decode() if store.check([_ATTEMPT]) else None
        if found is not None and rank > 0:
            store.set(_greeting(found, rank), mine)
            if store.check([_answer(found, mine)]):
                return found
        if rank == 0 and store.check([_greeting(mine, other) for other in range(1, world)]):
            for other in range(1, world):
                store.set(_answer(mine, store.get(_greeting(mine, other)).decode()), "1")
            return mine
        if time.monotonic() > deadline:
            raise RankLost(
                f"the ranks have not met within {timeout_s:g} s: {_absent(store, found, rank, world)}"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.25)


_ATTEMPT = "megamm/attempt"


def _greeting(attempt: str, rank: int) -> str:
    return f"megamm/{attempt}/greeting/{rank}"


def _answer(attempt: str, word: str) -> str:
    return f"megamm/{attempt}/answer/{word}"


def _absent(store: dist.Store, attempt: str | None, rank: int, world: int) -> str:
    if rank > 0:
        return "rank 0 does not answer; look into its output"
    absent = [str(other) for other in range(1, world) if not store.check([_greeting(str(attempt), other)])]
    return f"rank {', '.join(absent)} did not come; look into the output there"


@contextmanager
def fake_world(parallel: ParallelConfig, world: int, rank: int) -> Iterator[Groups]:
    """The groups of process `rank` among `world` that do not exist, to build its part of a model on the meta
    device (`with torch.device("meta")`): no environment is read, nothing is sent or received.

    Raises:
        RuntimeError: this process is part of a real world (or of another fake one).
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("process groups exist; a fake world needs a process without (groups.shutdown())")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        _build(parallel)
        yield current(torch.device("meta"))
    finally:
        shutdown()


def _build(parallel: ParallelConfig) -> None:
    """megatron-core's model-parallel groups in the world that was joined."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, parallel.timeout_s // 60),
    )
    # some of megatron's modules ask for an RNG tracker even when nothing is random
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0)


def _reuse(parallel: ParallelConfig, device: torch.device) -> Groups:
    """The existing groups, if they are the ones asked for (loading two models in one process, say)."""
    groups = current(device)
    sizes = (groups.tp_size, groups.pp_size, groups.collection.cp.size())
    if sizes != (parallel.tensor, parallel.pipeline, parallel.context):
        raise RuntimeError("process groups exist with another layout; call groups.shutdown() first")
    return groups


def current(device: torch.device) -> Groups:
    """The coordinates of this process; the groups must have been built."""
    pgs = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        collection=pgs,
        device=device,
        tp_rank=pgs.tp.rank(),
        tp_size=pgs.tp.size(),
        pp_rank=pgs.pp.rank(),
        pp_size=pgs.pp.size(),
        dp_rank=pgs.dp.rank(),
        dp_size=pgs.dp.size(),
    )


def shutdown() -> None:
    """Leave the process group (waits for nobody)."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
