"""Where gradients have to go in a pipeline with frozen parts: nowhere below the first trained parameter.

A boundary between two chunks of the pipeline carries a gradient only if something below it is trained.
Where nothing is, the upper chunk cuts its input off the graph, so that no backward pass runs below its
own first trained parameter, and nothing is sent or awaited. megatron-core's schedules stay as they are:
their communicator knows which receives have no sender.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from megamm.engine.groups import Groups


@dataclass(frozen=True)
class GradientSources:
    """What a chunk of the pipeline adds to the gradients that flow down to it.

    Attributes:
        hidden: the hidden states it sends on depend on trained parameters of its own.
        media: so do the media tokens it sends on beside them.
        mixes_media: it lets the hidden states attend to the media.
    """

    hidden: bool
    media: bool
    mixes_media: bool


@dataclass(frozen=True)
class GradientNeeds:
    """Which parts of the tensor between two chunks depend on trained parameters below."""

    hidden: bool = True
    media: bool = True

    @property
    def any(self) -> bool:
        return self.hidden or self.media


class Chunk(Protocol):
    """What a model must offer to take part."""

    def gradient_sources(self) -> GradientSources:
        """What this chunk trains."""

    def connect(self, incoming: GradientNeeds, outgoing: GradientNeeds) -> None:
        """Take note of what the boundaries below and above need."""


def connect_chunks(models: Sequence[Chunk], groups: Groups) -> None:
    """Tell every chunk which gradients cross its two boundaries (collective over the pipeline)."""
    mine = [model.gradient_sources() for model in models]
    everywhere: list[Any] = [mine]
    if groups.pp_size > 1:
        everywhere = [None] * groups.pp_size
        dist.all_gather_object(everywhere, mine, group=groups.collection.pp)
    # chunk c of rank r stands at position c * pp_size + r
    in_order = [everywhere[rank][chunk] for chunk in range(len(models)) for rank in range(groups.pp_size)]
    needs = list(_needs_at_boundaries(in_order))
    for chunk, model in enumerate(models):
        position = chunk * groups.pp_size + groups.pp_rank
        model.connect(incoming=needs[position], outgoing=needs[position + 1])


def _needs_at_boundaries(sources: Sequence[GradientSources]) -> Iterator[GradientNeeds]:
    """The needs below the first chunk, between all chunks, and above the last."""
    hidden = media = False
    yield GradientNeeds(hidden, media)
    for source in sources:
        media = media or source.media
        hidden = hidden or source.hidden or (media and source.mixes_media)
        yield GradientNeeds(hidden, media)


class GradientCommunicator(P2PCommunicator):
    """megatron-core's point-to-point communication without the gradients that nobody needs.

    The sending side needs no care: an input that was cut off has no gradient, and megatron sends none.

    Args:
        receives: for the gradients that a schedule asks for in one step, in order: is there a sender?
    """

    def __init__(self, pp_group: Any, config: Any, receives: Iterator[bool]) -> None:
        super().__init__(pp_group, config)
        self._receives = receives

    def _communicate(self, *, recv_next: bool, **rest: Any) -> Any:
        if not recv_next or next(self._receives):
            return super()._communicate(recv_next=recv_next, **rest)
        received, _, requests = super()._communicate(recv_next=False, **rest)
        if isinstance(requests, dict):  # an overlapping schedule waits for each receive it asked for
            requests["recv_next"] = _Nothing()
        return received, None, requests


class _Nothing:
    """The request of a message that is not sent."""

    def wait(self) -> None:
        return


def communicator(models: Sequence[Any], groups: Groups, num_micro_batches: int) -> GradientCommunicator:
    """The communicator of one step, for the unwrapped chunks of this rank."""
    config = models[0].config
    outgoing = [model.outgoing.any for model in models]
    if len(models) == 1:
        receives: Iterator[bool] = cycle(outgoing)
    else:
        receives = iter([outgoing[chunk] for chunk in _gradient_order(config, groups, num_micro_batches)])
    return GradientCommunicator(groups.collection.pp, config, receives)


def _gradient_order(config: Any, groups: Groups, num_micro_batches: int) -> list[int]:
    """The chunks for which the interleaved schedule receives gradients, in its order."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    table = get_schedule_table(num_micro_batches, num_chunks, config.microbatch_group_size_per_vp_stage)
    order = [num_chunks - 1 - chunk for _, chunk in table]
    # nothing comes after the last chunk of the last stage
    return [chunk for chunk in order if not (groups.is_last_stage and chunk == num_chunks - 1)]


def cut(x: torch.Tensor, needs_gradient: bool) -> torch.Tensor:
    """`x`, cut off the graph if no gradient is needed below it."""
    return x if needs_gradient else x.detach()
