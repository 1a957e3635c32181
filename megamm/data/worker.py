"""A loader process: makes one micro-batch after the other for its parent (see workers.py)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import traceback
from multiprocessing.connection import Connection

import torch

from megamm.data.batch_maker import Ingredients
from megamm.data.worker_link import Announced, Failed, Job, Ready, send_made

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(descriptor: int, parent: int) -> None:
    """Serve process `parent` over the socket `descriptor` until it closes that or ends."""
    _end_with(parent)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError), Connection(descriptor) as link:
        _serve(link)


def _serve(link: Connection) -> None:
    ingredients: Ingredients = link.recv()
    try:
        maker = ingredients.maker(ingredients.open_dataset())
    except Exception as error:
        link.send(_failed(None, error))
        return
    link.send(Ready())
    while True:
        job: Job = link.recv()
        announce = (lambda image: link.send(Announced(image))) if job.careful else None
        try:
            made = maker.make(job.places, job.refused, announce)
        except Exception as error:
            link.send(_failed(job.number, error))
        else:
            send_made(link, job.number, made)


def _failed(number: int | None, error: Exception) -> Failed:
    where = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))  # not every exception survives this
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Failed(number, error, where)


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; what a user or a scheduler signals is for the
    parent to answer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
