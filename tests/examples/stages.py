"""Scripts of stages, started as on a cluster: torchrun is the real one, Slurm's commands are stand-ins that
start the tasks of two "nodes" on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "examples" / "cluster"
STAND_INS = Path(__file__).parent / "slurm"
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: object) -> dict[str, str]:
    """For a script: this Python's commands first on the PATH, no launcher around it."""
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), own["PATH"]])
    own |= {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return own | {name: str(value) for name, value in more.items()}


def stage_script(folder: Path, recipe: Path) -> Path:
    """What examples/SYSTEM/STAGE.sh is, for a recipe of the test."""
    script = folder / "stage.sh"
    script.write_text(f'#!/usr/bin/env bash\nexec bash "{CLUSTER}/launch.sh" "{recipe}" "$@"\n')
    return script
