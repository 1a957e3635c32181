"""RUN_DIR/environment.json: where, with what and how a run was started, once for each start."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megamm
from megamm.device import device_name

FILE = "environment.json"
PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "flash-attn", "numpy", "triton"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-dali-cuda120", "tokenizers", "sentencepiece", "pillow"),
)
# Variables that change what a run does or say where it ran.
VARIABLES = re.compile(
    r"(NCCL|CUDA|OMP|MKL|NVTE|TORCH|TORCHELASTIC|PYTORCH|GLOO|UCX|FI|NVIDIA)_\w+|SLURM_(JOB|STEP|ARRAY|RESTART"
    r"|CLUSTER|N|GPUS|CPUS|SUBMIT)\w*|KMP_\w+|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|LD_PRELOAD|WANDB_MODE"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)
GIT_PATIENCE_S = 20  # network file systems


def record_start(run_dir: str | Path, step: int, device: torch.device) -> None:
    """Add this start to the list in RUN_DIR/environment.json; every rank of the run calls this.

    Args:
        step: optimizer steps already done.
        device: of this rank.
    """
    mine = (socket.gethostname(), device_name(device))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if dist.get_rank() != 0:
        return
    start = describe_start(step, [host for host, _ in found], [name for _, name in found])
    path = Path(run_dir) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps([*read_starts(path), start], indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where the file is missing or unreadable."""
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def describe_start(step: int, hosts: list[str], devices: list[str]) -> dict[str, Any]:
    """What is kept of a start, without anything secret.

    Args:
        step: optimizer steps already done.
        hosts, devices: of each rank.
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "world_size": len(hosts),
        "hosts": dict(Counter(hosts)),
        "devices": dict(Counter(devices)),
        "command": [sys.executable, *sys.argv],
        "directory": os.getcwd(),
        "git": git_state(Path(megamm.__file__).resolve().parent),
        "versions": _versions(),
        "platform": platform.platform(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if VARIABLES.fullmatch(name) and not SECRET.search(name)
        },
    }


def git_state(package: Path) -> dict[str, Any] | None:
    """The revision of the checkout that the code of `package` belongs to, and whether the code differs from
    it (files that git does not know included); None where there is no checkout, or no git."""
    root = package.parent
    if _git(root, "ls-files", "--error-unmatch", f"{package.name}/__init__.py") is None:
        return None  # installed, perhaps below somebody's repository
    revision = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", package.name, "csrc")
    if revision is None or changes is None:
        return None
    return {"revision": revision, "dirty": bool(changes)}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        # no lock: other processes may use the checkout at the same time
        result = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _versions() -> dict[str, str]:
    versions = {"megamm": megamm.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions
