"""What `gpu.py` would train: sizes from models on the meta device, work and memory from the planner."""

from __future__ import annotations

from collections.abc import Sequence

from common import Table
from gpu_models import TRAININGS

from megamm.planning.dry_run import parameter_counts
from megamm.planning.flops import flops_per_step
from megamm.planning.hardware import gpu_by_name
from megamm.planning.memory import largest_stage

GPU = "h200"
COLUMNS = ["experiment", "parameters", "trained", "positions a step", "images", "TFLOP a step", "GB", "fits"]


def table(names: Sequence[str]) -> Table:
    """A row for each training among `names`."""
    gpu = gpu_by_name(GPU)
    found = Table(f"On one {gpu.name} of {gpu.memory_bytes / 1e9:.0f} GB", COLUMNS)
    for name in (name for name in TRAININGS if name in names):
        plan = TRAININGS[name]
        recipe = plan.recipe(False, "local" if plan.fp8 == "off" else "te")
        counts = parameter_counts(recipe).values()
        packing = plan.packing(recipe)
        images = int(packing.images[: packing.count].sum())
        flops = flops_per_step(recipe, packing.positions, images, packing.labels)
        most = max(int(packing.images[row].sum()) for row in packing.rows)
        _, memory = largest_stage(recipe, 1, most)
        total = memory.total
        if name == "flamingo":  # beside ours lies the peer's, in bf16 (its activations are not counted)
            total += 2 * sum(c.total for c in counts) + 6 * sum(c.trainable for c in counts)
        found.add(
            name,
            f"{sum(c.total for c in counts) / 1e9:.2f}e9",
            f"{sum(c.trainable for c in counts) / 1e9:.3f}e9",
            f"{packing.positions:,}",
            images,
            f"{flops / 1e12:,.0f}",
            f"{total / 1e9:.0f}",
            "yes" if total <= gpu.memory_bytes else "NO",
        )
    return found
