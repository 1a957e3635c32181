"""megamm doctor: what is installed, what works, what is wrong and the remedy."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megamm.cli.common import add_command, add_json, print_json

MEGATRON_VERSION = "0.16.1"  # the one megamm.engine is written against
OLDEST_PYTHON = (3, 10)
SCARCE_DISK = 5 << 30
REMEDY_INSTALL = "bash tools/bootstrap.sh"


@dataclass(frozen=True)
class Finding:
    """One line of the report; "absent" is an optional part that is not there, and no problem."""

    name: str
    state: Literal["ok", "absent", "problem"]
    detail: str
    remedy: str = ""


def add_parsers(commands: Any) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands, "doctor", run, "show what is installed, what works, what is wrong", "megamm doctor --json"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run `megamm doctor`; exit code 1 if there is a problem."""
    findings = examine()
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            print(line(finding))
    return 1 if any(finding.state == "problem" for finding in findings) else 0


def examine() -> list[Finding]:
    """Every finding, most basic first. Nothing is started and no GPU memory is taken."""
    checks = (
        _python,
        _packages,
        _gpus,
        _engine,
        _extension,
        _backends,
        _fp8,
        _images,
        _exports,
        _apex,
        _machine,
    )
    return [finding for check in checks for finding in check()]


def line(finding: Finding) -> str:
    """A finding as text: state, name, detail, remedy."""
    mark = {"ok": "ok     ", "absent": "absent ", "problem": "PROBLEM"}[finding.state]
    remedy = f"; remedy: {finding.remedy}" if finding.remedy and finding.state != "ok" else ""
    return f"{mark} {finding.name:<18} {finding.detail}{remedy}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Iterator[Finding]:
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield Finding("python", "problem", detail, f"use Python {wanted} or newer")
    else:
        yield Finding("python", "ok", detail)


def _packages() -> Iterator[Finding]:
    """The required packages, as the installed metadata of megamm lists them."""
    try:
        from packaging.requirements import Requirement

        requirements = [Requirement(text) for text in importlib.metadata.requires("megamm") or []]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        yield Finding("megamm", "problem", "the package is not installed in this Python", REMEDY_INSTALL)
        return
    required = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    bad = []
    for requirement in required:
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            bad.append(f"{requirement} ({found or 'not installed'})")
    if bad:
        yield Finding("packages", "problem", ", ".join(bad), REMEDY_INSTALL)
    else:
        yield Finding("packages", "ok", f"all {len(required)} required packages are installed")


def _gpus() -> Iterator[Finding]:
    """What the driver sees, and whether torch can use it."""
    if importlib.util.find_spec("torch") is None:
        yield Finding("torch", "problem", "not installed", REMEDY_INSTALL)
        return
    import torch

    from megamm.device import pick_device

    seen = _nvidia_smi()
    usable = pick_device("auto").type == "cuda"
    yield Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    for gpu in seen:
        yield Finding("gpu", "ok", gpu)
    if seen and not usable:
        remedy = "install a CUDA build of torch that the driver supports"
        yield Finding("cuda", "problem", f"the driver sees {len(seen)} GPU(s), torch cannot use them", remedy)
    elif not usable:
        yield Finding("cuda", "absent", "no GPU; everything runs on the CPU")


def _nvidia_smi() -> list[str]:
    """One line for each GPU the driver sees."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if result.returncode != 0:
        return []
    return [row.strip() for row in result.stdout.splitlines() if row.strip()]


def _engine() -> Iterator[Finding]:
    found = _version("megatron-core")
    if found == MEGATRON_VERSION:
        yield Finding("megatron-core", "ok", found)
    else:
        remedy = f"pip install megatron-core=={MEGATRON_VERSION}"
        yield Finding("megatron-core", "problem", found or "not installed", remedy)


def _extension() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from megamm.ops import extension_built, extension_status

    if extension_built():
        yield Finding("fused ops", "ok", extension_status())
    else:
        detail = f"{extension_status()} (the same numbers, slower)"
        yield Finding("fused ops", "problem", detail, REMEDY_INSTALL)


def _backends() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from megamm.device import backend_status, choose_backend
    from megamm.errors import InputError

    for name, status in backend_status().items():
        state: Literal["ok", "absent"] = "ok" if status.works else "absent"
        yield Finding(f"backend {name}", state, status.reason, status.remedy)
    try:
        chosen, reason = choose_backend("auto")
        yield Finding("backend chosen", "ok", f"{chosen} ({reason})")
    except InputError as error:
        yield Finding("backend chosen", "problem", str(error), REMEDY_INSTALL)


def _fp8() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    from megamm.device import fp8_status

    found = fp8_status()
    works = [scaling for scaling, status in found.items() if status.works]
    fails = {scaling: status for scaling, status in found.items() if not status.works}
    reasons = {(status.reason, status.remedy) for status in fails.values()}
    if works:
        yield Finding("FP8", "ok", f"scalings that work: {', '.join(works)} ({found[works[0]].reason})")
    elif len(reasons) == 1:
        yield Finding("FP8", "absent", *next(iter(reasons)))
    else:
        detail = "; ".join(f"{scaling}: {status.reason}" for scaling, status in fails.items())
        yield Finding("FP8", "absent", detail)


def _images() -> Iterator[Finding]:
    packages = [f"nvidia-dali-cuda{cuda}" for cuda in (130, 120, 110)]
    found = next((f"{p} {_version(p)}" for p in packages if _version(p)), None)
    if found is None:
        remedy = "pip install 'megamm[dali]'"
        yield Finding("DALI", "absent", "not installed; pictures are decoded by Pillow", remedy)
        return
    try:
        importlib.import_module("nvidia.dali")
    except Exception as error:  # a broken install raises anything
        yield Finding("DALI", "problem", f"{found} does not import: {error}", f"reinstall {found.split()[0]}")
    else:
        yield Finding("DALI", "ok", found)


def _exports() -> Iterator[Finding]:
    found = _version("transformers")
    if found is None:
        detail = "not installed; only needed to load exported models and for some tests"
        yield Finding("transformers", "absent", detail, "pip install 'megamm[hf]'")
    else:
        yield Finding("transformers", "ok", found)


def _apex() -> Iterator[Finding]:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return
    places = [Path(place) for place in spec.submodule_search_locations or []]
    if not any((place / "optimizers").is_dir() for place in places):
        yield Finding(
            "apex", "problem", "an unrelated package of that name is installed", "pip uninstall apex"
        )


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", "ok", f"{cores} of {os.cpu_count()} usable, {platform.machine()}")
    if importlib.util.find_spec("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        detail = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available"
        yield Finding("memory", "ok", detail)
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{free / 2**30:.1f} GiB free at {Path.cwd()}"
    if free < SCARCE_DISK:
        yield Finding("disk", "problem", detail, "free some space: checkpoints would not fit")
    else:
        yield Finding("disk", "ok", detail)
