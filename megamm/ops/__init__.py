"""Fused operators: one module per operator, each with its reference in plain torch.

The compiled half (`csrc/`, built as `megamm/_C*.so`) is looked for once, when this package is imported.
Without it every operator runs its reference: the same numbers, slower.
"""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch


def _load_extension() -> tuple[bool, str]:
    """Loads the compiled operators into `torch.ops.megamm`; returns (loaded, what a user should know)."""
    spec = importlib.util.find_spec("megamm._C")
    if spec is None or spec.origin is None:
        return (
            False,
            "the extension is not built (MEGAMM_BUILD_EXT=1 pip install --no-build-isolation -e . builds it)",
        )
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86 and torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # setup.py compiles for AVX2 there
        return False, "the extension is built for CPUs with AVX2, which this one lacks"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:  # most often built against another torch
        return (
            False,
            f"{spec.origin} does not load ({error}); rebuild it: pip install --no-build-isolation -e .",
        )
    return True, f"the extension is loaded from {spec.origin}"


_LOADED, _STATUS = _load_extension()


def extension_built() -> bool:
    """Whether the compiled operators are in use (else every operator runs its torch reference)."""
    return _LOADED


def extension_status() -> str:
    """One sentence on the compiled operators: from where they were loaded, or why not and the remedy."""
    return _STATUS


def fused_devices(operator: str) -> frozenset[str]:
    """Device types for which the extension holds a kernel of `operator` ("cpu", "cuda"; "meta" with any)."""
    if not _LOADED:
        return frozenset()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found = {d for d in ("cpu", "cuda") if has_kernel(f"megamm::{operator}", d.upper())}
    return frozenset(found | {"meta"} if found else found)


def call(operator: Any, *args: Any) -> Any:
    """An operator of the extension. Where no gradient is wanted it is called below autograd, whose half in
    Python takes longer than the kernel does for a few tokens."""
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)
