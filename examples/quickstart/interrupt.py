"""Kills a training run half way, as a power cut would: SIGKILL to every process of it.

    python examples/quickstart/interrupt.py PID RUN_DIR

Waits until the run has done half of its steps and at least one step since its last checkpoint, so
that something is lost and has to be computed again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import psutil

from megamm.recipe import load_recipe
from megamm.training.metrics import read_metrics

POLL_S = 0.2


def last_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl (0: none yet)."""
    return max((row["step"] for row in read_metrics(run_dir / "metrics.jsonl")), default=0)


def last_checkpoint(run_dir: Path) -> int:
    """The step of the newest checkpoint (0: none yet)."""
    return max((int(p.name.split("_")[1]) for p in run_dir.glob("checkpoints/step_*")), default=0)


def is_time(run_dir: Path) -> bool:
    """Half of the steps are done, and some of them are in no checkpoint."""
    recipe = run_dir / "recipe.yaml"
    if not recipe.exists() or not last_checkpoint(run_dir):
        return False
    done = last_step(run_dir)
    return done >= load_recipe(recipe).training.steps // 2 and done > last_checkpoint(run_dir)


def kill_tree(process: psutil.Process) -> int:
    """SIGKILL a process and all its descendants at once; returns how many there were."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=10)
    return len(family)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pid", type=int, help="of torchrun")
    parser.add_argument("run_dir", type=Path)
    args = parser.parse_args()
    try:
        process = psutil.Process(args.pid)
        while not is_time(args.run_dir):
            if process.status() == psutil.STATUS_ZOMBIE:
                raise psutil.NoSuchProcess(args.pid)
            time.sleep(POLL_S)
        step = last_step(args.run_dir)
        killed = kill_tree(process)
    except psutil.NoSuchProcess:
        print("interrupt.py: training ended before it could be killed; see the lines above", file=sys.stderr)
        return 1
    print(f"killed {killed} processes after step {step}; checkpoint of step {last_checkpoint(args.run_dir)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
