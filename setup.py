"""Builds the fused operators (csrc/) as megamm/_C; everything else about the package is in pyproject.toml.

MEGAMM_BUILD_EXT      unset: try, and go on without the extension if it cannot be compiled (megamm then runs
                      the operators in plain torch: the same numbers, slower). 1: failing to compile is an
                      error. 0: do not try.
TORCH_CUDA_ARCH_LIST  GPUs to compile for; unset: 8.0 (A100) and 9.0a (H100, H200).

The CUDA half is built where torch has CUDA and nvcc is found. Install with --no-build-isolation: the
extension must be compiled against the torch that will load it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CHOICE = os.environ.get("MEGAMM_BUILD_EXT", "")
CPU_SOURCES = sorted(map(str, Path("csrc").glob("*/*.cpp")))
CUDA_SOURCES = sorted(map(str, Path("csrc").glob("*/*.cu")))
WITHOUT = (
    "megamm: WARNING: installing without the fused operators, they run in plain torch (same results, slower)."
    " MEGAMM_BUILD_EXT=1 makes this an error. The reason:"
)


def cpu_flags() -> list[str]:
    """Compiler flags of the CPU half.

    On x86-64 the kernels are compiled for AVX2 (any server CPU since 2013) and not for the CPU at hand: on a
    cluster the machine that builds is rarely the one that trains. megamm.ops declines to load the extension
    on a CPU without AVX2.
    """
    flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        flags += ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"]
    return flags


def has_cuda() -> bool:
    """Whether the CUDA half can be compiled: a torch with CUDA, and the compiler for it."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    return torch.version.cuda is not None and CUDA_HOME is not None and Path(CUDA_HOME, "bin/nvcc").exists()


def extension() -> dict[str, Any]:
    """The arguments of setup() that build megamm._C."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, is_ninja_available

    class Build(BuildExtension):  # type: ignore[misc]
        """Turns a failed compilation into a warning, unless the extension was asked for."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "use_ninja": is_ninja_available()})

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever a missing or failing compiler leads to
                if CHOICE == "1":
                    raise
                print(f"{WITHOUT} compiling failed: {error}", file=sys.stderr)
                remove_built()
                self.extensions = []  # an editable install would look for what it was promised

    # Compiled with OpenMP but not linked to it: the runtime comes with torch, a second one would give every
    # process two pools of threads.
    if has_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
        built = CUDAExtension(
            "megamm._C",
            CPU_SOURCES + CUDA_SOURCES,
            define_macros=[("MEGAMM_WITH_CUDA", None)],
            extra_compile_args={"cxx": cpu_flags(), "nvcc": ["-O3"]},
        )
    else:
        built = CppExtension("megamm._C", CPU_SOURCES, extra_compile_args=cpu_flags())
    return {"ext_modules": [built], "cmdclass": {"build_ext": Build}}


def remove_built() -> None:
    """Removes an extension built earlier, which no longer is what csrc/ says."""
    for library in Path("megamm").glob("_C*.so"):
        library.unlink()


def main() -> None:
    """Decides about the extension, then hands over to setuptools."""
    if CHOICE not in ("", "0", "1"):
        sys.exit(f"MEGAMM_BUILD_EXT: {CHOICE!r} is unknown; use 0, 1 or leave it unset")
    arguments: dict[str, Any] = {}
    if CHOICE == "0":
        remove_built()
    elif importlib.util.find_spec("torch") is not None:
        arguments = extension()
    else:
        reason = "torch is not installed here; install it first, then megamm with --no-build-isolation"
        if CHOICE == "1":
            sys.exit(f"MEGAMM_BUILD_EXT=1: {reason}")
        print(f"{WITHOUT} {reason}", file=sys.stderr)
    setup(**arguments)


main()
