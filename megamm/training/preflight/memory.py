"""Whether the estimate of what a step needs fits into what the device has."""

from __future__ import annotations

import torch.distributed as dist

from megamm.config import Recipe
from megamm.device import device_name, memory_limit
from megamm.engine.groups import Groups
from megamm.planning.memory import memory_of_stage
from megamm.training.preflight.found import Found

GIB = 2**30


def check_memory(recipe: Recipe, layout: Groups) -> Found:
    """The estimate for this rank's pipeline stage against its GPU, or its share of the node's memory."""
    needed = memory_of_stage(recipe, dist.get_world_size(), layout.pp_rank).total
    limit = memory_limit(layout.device)
    if needed <= limit:
        return Found()
    what = (
        device_name(layout.device) if layout.device.type == "cuda" else "this process's share of the memory"
    )
    return Found(
        [
            f"a rank of pipeline stage {layout.pp_rank} needs about {needed / GIB:.2f} GiB and {what} is "
            f"{limit / GIB:.2f} GiB; lower training.micro_batch_size, recompute more (training.recompute), "
            "or take a layout that `megamm plan` finds"
        ]
    )
