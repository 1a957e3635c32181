"""What a loader process and its parent tell each other, over a socket of two ends.

Everything but tensors is pickled (both ends are processes of one run). The tensors of a micro-batch lie in a
block of anonymous memory whose descriptor goes over the socket. It has no name: nothing is left behind in
/dev/shm whoever is killed when, and its size is not bounded by that of /dev/shm.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import fields
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import torch

from megamm.batch import Batch
from megamm.data.batch_maker import Made
from megamm.data.quarantine import FileName
from megamm.data.step_plan import Place

ALIGNMENT = 64  # bytes


class Job(NamedTuple):
    """Parent to worker: make micro-batch `number`. `careful`: announce each image before it is decoded."""

    number: int
    places: Sequence[Place]
    refused: frozenset[FileName]
    careful: bool


class Ready(NamedTuple):
    """Worker to parent: has opened the dataset, waits for jobs."""


class Announced(NamedTuple):
    """Worker to parent: decodes this image next."""

    image: FileName


class Failed(NamedTuple):
    """Worker to parent: raised this, there (number None: before any job)."""

    number: int | None
    error: Exception
    where: str


class Placed(NamedTuple):
    """Where a tensor of a micro-batch lies: `offset` in bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Finished(NamedTuple):
    """Worker to parent: made micro-batch `number`; the descriptor of its memory follows.

    Attributes:
        made: without the batch.
        values, tensors: the fields of the batch.
        size: bytes of the memory.
    """

    number: int
    made: Made
    values: dict[str, Any]
    tensors: dict[str, Placed]
    size: int


Message = Ready | Announced | Failed | Finished  # what a worker says


def send_made(link: Connection, number: int, made: Made) -> None:
    """Send a micro-batch to the parent."""
    values = {field.name: getattr(made.batch, field.name) for field in fields(Batch)}
    contents = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    tensors, size = {}, 0
    for name, tensor in contents.items():
        tensors[name] = Placed(size, tuple(tensor.shape), tensor.dtype)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    descriptor = os.memfd_create("megamm micro-batch")
    try:
        os.ftruncate(descriptor, size)
        memory = mmap.mmap(descriptor, size)
        for name, place in tensors.items():
            _view(memory, place).copy_(contents[name])
        rest = {name: value for name, value in values.items() if name not in contents}
        link.send(Finished(number, made._replace(batch=None), rest, tensors, size))  # type: ignore[arg-type]
        send_handle(link, descriptor, os.getppid())
    finally:
        os.close(descriptor)


def receive_made(link: Connection, message: Finished) -> Made:
    """The micro-batch that `message` announces; its tensors are the worker's memory, not a copy.

    Raises:
        EOFError, OSError, RuntimeError: the worker died before it was through.
    """
    descriptor = recv_handle(link)
    try:
        memory = mmap.mmap(descriptor, message.size)
    finally:
        os.close(descriptor)
    values = message.values | {name: _view(memory, place) for name, place in message.tensors.items()}
    return message.made._replace(batch=Batch(**values))


def _view(memory: mmap.mmap, place: Placed) -> torch.Tensor:
    offset, shape, dtype = place
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
