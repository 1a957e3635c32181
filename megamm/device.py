"""Which device, dtype and backend a run uses: chosen once, at start, and said aloud.

The only module outside `megamm.engine` that touches `torch.cuda`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

from megamm.errors import InputError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_CGROUP = Path("/sys/fs/cgroup")
# Workspaces of cuBLAS that are not shared by streams; no atomic additions in Transformer Engine's attention;
# one algorithm of NCCL, whose order of additions does not depend on what was measured when it started.
_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    "NCCL_ALGO": "Ring",
}
_ALSO_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":16:8",),
    "NCCL_ALGO": ("Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}
_TE_REMEDY = "install NVIDIA's Transformer Engine (tools/install_gpu.sh) or set parallel.backend=local"


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works here, and if not, why and what helps."""

    works: bool
    reason: str
    remedy: str = ""


def pick_device(choice: str = "auto") -> torch.device:
    """The device of this process; a CUDA device also becomes the current one.

    Args:
        choice: "auto" (CUDA where there is one), "cpu" or "cuda". Under torchrun or srun the process
            takes the GPU of its LOCAL_RANK.

    Raises:
        InputError: CUDA was asked for and is not there, or there are more local ranks than GPUs.
    """
    if choice not in ("auto", "cpu", "cuda"):
        raise InputError(f"training.device: {choice!r} is unknown; use auto, cpu or cuda")
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"training.device: cuda was asked for but {_no_cuda()}; use device=cpu or auto")
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise InputError(
            f"LOCAL_RANK: process {local_rank} of this node has no GPU, the node has {num_gpus};"
            f" start at most {num_gpus} processes per node"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def num_gpus() -> int:
    """CUDA devices of this machine that torch can use."""
    return torch.cuda.device_count()


def distributed_backend(device: torch.device) -> str:
    """The torch.distributed backend for tensors on `device`: "nccl" or "gloo"."""
    return "nccl" if device.type == "cuda" else "gloo"


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that a recipe calls `precision` ("fp32" or "bf16")."""
    if precision not in _DTYPES:
        raise InputError(f"training.precision: {precision!r} is unknown; use {' or '.join(_DTYPES)}")
    return _DTYPES[precision]


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators (every device) with `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def require_determinism() -> None:
    """Have every operation give the same bits every time, or fail if it cannot. Before anything runs on a
    GPU: cuBLAS and Transformer Engine read their settings once.

    Raises:
        InputError: the environment asks for the contrary.
    """
    for name, value in _DETERMINISTIC.items():
        if os.environ.setdefault(name, value) not in (value, *_ALSO_DETERMINISTIC.get(name, ())):
            raise InputError(
                f"training.deterministic: {name}={os.environ[name]} is set, with which results differ from "
                f"run to run; unset it (it becomes {value}), or set training.deterministic=false"
            )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def memory_used(device: torch.device | str = "cpu") -> int:
    """Peak memory in bytes: allocated tensors on a CUDA device, else the resident set of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may use: all memory of its GPU, or its share of what the node has available
    (of the container's limit, where it has one)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # "max": without limit
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        # files that were read count as used, until something else needs the room
        available = min(available, limit - used + int(stat.get("inactive_file", 0)))
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def backend_status() -> dict[str, BackendStatus]:
    """What works here, by name: "te", "local" and "flash-attn" (an option of "local")."""
    return {"te": _te_status(), "local": _local_status(), "flash-attn": _flash_attn_status()}


def choose_backend(choice: str = "auto") -> tuple[str, str]:
    """The backend of the transformer layers and the reason for it, for the log.

    Args:
        choice: "auto" (te where it works, else local), "te" or "local".

    Returns:
        (name, reason), name being "te" or "local".

    Raises:
        InputError: unknown name, or a backend was asked for that does not work here.
    """
    if choice not in ("auto", "te", "local"):
        raise InputError(f"parallel.backend: {choice!r} is unknown; use auto, te or local")
    if choice == "auto":
        te = _te_status()
        if te.works:
            return "te", f"auto: {te.reason}"
        return "local", f"auto: te does not work here ({te.reason})"
    status = _te_status() if choice == "te" else _local_status()
    if not status.works:
        raise InputError(f"parallel.backend: {choice} does not work here: {status.reason}; {status.remedy}")
    return choice, f"asked for: {status.reason}"


@dataclass(frozen=True)
class _Fp8Needs:
    """What a scaling of FP8 asks of the machine.

    Attributes:
        capability: CUDA compute capability, at least.
        gpus: which ones have it.
        te: version of Transformer Engine, at least.
        cuda: that torch is built with, at least.
        asked: Transformer Engine's own verdict, a function of transformer_engine.pytorch: (works, reason).
    """

    capability: tuple[int, int]
    gpus: str
    te: tuple[int, int]
    cuda: tuple[int, int]
    asked: str


_FP8_NEEDS = {
    "delayed": _Fp8Needs((8, 9), "Ada, Hopper", (2, 0), (12, 1), "is_fp8_available"),
    "current": _Fp8Needs((8, 9), "Ada, Hopper", (2, 2), (12, 1), "is_fp8_available"),
    "blockwise": _Fp8Needs((9, 0), "Hopper", (2, 3), (12, 9), "is_fp8_block_scaling_available"),
    "mxfp8": _Fp8Needs((10, 0), "Blackwell", (2, 1), (12, 8), "is_mxfp8_available"),
}


def fp8_status() -> dict[str, BackendStatus]:
    """Whether FP8 works here, by its scaling ("delayed", "current", "blockwise", "mxfp8")."""
    te = _te_status()
    return {scaling: _fp8_status(needs, te) for scaling, needs in _FP8_NEEDS.items()}


def require_fp8(scaling: str, backend: str, device: torch.device) -> None:
    """Make sure that the FP8 of a recipe can be computed.

    Args:
        scaling: training.fp8.scaling; "off" needs nothing.
        backend: that was chosen for the transformer layers.
        device: of this process.

    Raises:
        InputError: why it does not work here.
    """
    if scaling == "off":
        return
    status = fp8_status()[scaling]
    if status.works and (backend != "te" or device.type != "cuda"):
        where = "the CPU" if device.type != "cuda" else f"parallel.backend {backend}"
        status = BackendStatus(False, f"it does not run on {where}")
    if not status.works:
        remedy = f"; {status.remedy}" if status.remedy else ""
        raise InputError(
            f"training.fp8.scaling: {scaling} does not work here: {status.reason}{remedy}; "
            "training.fp8.scaling=off trains in bf16"
        )


def _fp8_status(needs: _Fp8Needs, te: BackendStatus) -> BackendStatus:
    if not te.works:
        return te
    capability = torch.cuda.get_device_capability()
    if capability < needs.capability:
        (had, had_minor), (wanted, wanted_minor) = capability, needs.capability
        return BackendStatus(
            False,
            f"{torch.cuda.get_device_name()} has compute capability {had}.{had_minor}, and this scaling "
            f"needs {wanted}.{wanted_minor} ({needs.gpus}) or newer",
        )
    te_version, cuda_version = _version("transformer_engine"), torch.version.cuda or "0"
    for name, found, least in (
        ("Transformer Engine", te_version, needs.te),
        ("a torch built with CUDA", cuda_version, needs.cuda),
    ):
        if _numbers(found) < least:
            return BackendStatus(False, f"it needs {name} {least[0]}.{least[1]} or newer, not {found}")
    verdict = getattr(importlib.import_module("transformer_engine.pytorch"), needs.asked, None)
    if verdict is not None:
        found = verdict(return_reason=True)
        works, reason = found if isinstance(found, tuple) else (found, "")
        if not works:
            return BackendStatus(False, f"Transformer Engine says: {reason.rstrip('.')}")
    return BackendStatus(True, f"{torch.cuda.get_device_name()}, Transformer Engine {te_version}")


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 9) of "2.9.0+cu13"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device"


def _local_status() -> BackendStatus:
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        return BackendStatus(False, "megatron-core is not installed", "pip install megatron-core==0.16.1")
    return BackendStatus(True, f"megatron-core {importlib.metadata.version('megatron-core')}")


def _te_status() -> BackendStatus:
    """Transformer Engine works if its torch half imports and there is a GPU to run it on."""
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        return BackendStatus(False, "Transformer Engine is not installed", _TE_REMEDY)
    if not _te_core_libraries(Path(spec.submodule_search_locations[0])):
        # `pip install transformer-engine` alone: all of the Python code, none of the compiled code. Importing
        # it raises RuntimeError, also from within megatron-core.
        reason = "only the transformer-engine meta package is installed, without its compiled parts"
        return BackendStatus(False, reason, f"pip uninstall transformer-engine, or {_TE_REMEDY}")
    if not torch.cuda.is_available():
        return BackendStatus(False, f"Transformer Engine needs CUDA and {_no_cuda()}", _TE_REMEDY)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a broken install raises anything: ImportError, OSError, RuntimeError, ...
        return BackendStatus(False, f"import transformer_engine.pytorch failed: {error}", _TE_REMEDY)
    return BackendStatus(True, f"Transformer Engine {_version('transformer_engine')}")


def _te_core_libraries(package: Path) -> list[Path]:
    """The compiled core of Transformer Engine, wherever an editable, source or wheel install puts it."""
    places = (package.parent, package, package / "wheel_lib")
    return [library for place in places for library in place.glob("libtransformer_engine*")]


def _flash_attn_status() -> BackendStatus:
    remedy = "tools/install_gpu.sh; without it torch's scaled_dot_product_attention is used"
    if importlib.util.find_spec("flash_attn") is None:
        return BackendStatus(False, "flash-attn is not installed", remedy)
    if not torch.cuda.is_available():
        return BackendStatus(False, f"flash-attn needs CUDA and {_no_cuda()}", remedy)
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # compiled against another torch: OSError or ImportError
        return BackendStatus(False, f"import flash_attn failed: {error}", remedy)
    return BackendStatus(True, f"flash-attn {_version('flash_attn')}")


def _version(module: str) -> str:
    return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def device_name(device: torch.device) -> str:
    """What the device calls itself ("NVIDIA H100 80GB HBM3"), "cpu" for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def product_seconds(device: torch.device) -> float | None:
    """Seconds that a GPU takes for a matrix product of a fixed size, to be compared with other GPUs of the
    run; None on a CPU, whose cores other ranks share. Waits for what the GPU has to do before."""
    if device.type != "cuda":
        return None
    factor = torch.ones(4096, 4096, dtype=torch.bfloat16, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(factor, factor)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
