"""Processes that Slurm starts by itself (`srun megamm train ...`), without torchrun."""

from __future__ import annotations

from collections.abc import MutableMapping

from megamm.errors import InputError


def take_place_from_slurm(environment: MutableMapping[str, str]) -> None:
    """Give a task of a Slurm job step the variables that torchrun would: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE. Changes nothing where a launcher has set them, in a batch script or an interactive shell
    (which are no tasks of a step), or in a step of one task.

    Args:
        environment: changed in place.
    Raises:
        InputError: MASTER_ADDR, which Slurm does not know, is missing.
    """
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environment or tasks <= 1:
        return
    if "MASTER_ADDR" not in environment:
        raise InputError(
            "MASTER_ADDR: not set, so the tasks of this Slurm step cannot find each other; before srun, "
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    environment.setdefault("MASTER_PORT", "29500")
    environment["WORLD_SIZE"] = str(tasks)
    for name, slurm_name in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")):
        environment[name] = environment[slurm_name]
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # "8(x4)", "8,4"
    if per_node and "," not in per_node:
        environment["LOCAL_WORLD_SIZE"] = per_node.partition("(")[0]
