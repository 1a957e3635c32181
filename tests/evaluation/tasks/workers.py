"""Ranks of an evaluation, each of them a copy of a stand-in."""

from __future__ import annotations

import datetime
import os
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megamm.errors import RunError
from megamm.evaluation.tasks import TaskSettings
from megamm.evaluation.tasks.run import prepare
from megamm.evaluation.tasks.scoring import official
from tests.evaluation.tasks.stand_in import StandIn, recipe


def answer(data: str, out: str, copies: int, fails: int = -1, slow: int = -1) -> dict[str, Any]:
    """Take the exam on this rank; what it found, asked and said.

    Args:
        copies: of the model; ranks beyond them are the second of their copy.
        fails: rank that fails at its second batch.
        slow: rank that is slower than a collective would wait for.
    """
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))

    def said(prompt: str, numbers: list[int], decoding: Any) -> str:
        if rank == fails and len(model.batches) > 1:
            raise RunError("out of memory")
        if rank == slow:
            time.sleep(3)
        return f"picture {numbers[0]}"

    model = StandIn(said)
    model.num_copies, model.copy, model.is_spokesman = copies, rank % copies, rank < copies
    examination = prepare(recipe(), "vqav2", [Path(data)], Path(out), TaskSettings(batch_size=2))
    found: dict[str, Any] = {"error": "", "result": None}
    start = time.monotonic()
    try:
        result = examination.take(model, official)
        found["result"] = result.as_dict() if result is not None else None
    except RunError as error:
        found["error"] = str(error)
    return found | {"asked": sorted(n[0] for _, n, _ in model.asked), "seconds": time.monotonic() - start}
