"""The GPUs that plans are made for: presets/hardware.yaml, where every number has its origin."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megamm.errors import InputError

PRESETS = Path(__file__).parent / "presets" / "hardware.yaml"


@dataclass(frozen=True)
class Achieved:
    """Which share of the promised rates training gets; see the preset file for how each was found.

    Attributes:
        gemm, fp8_gemm: of the peak, in a large matrix product.
        attention_forward, attention_backward: of the bf16 peak, in flash attention.
        hbm: of the memory bandwidth, in memory-bound kernels.
        nvlink, network: of the bandwidth of one direction, in collectives of large tensors.
    """

    gemm: float
    fp8_gemm: float | None
    attention_forward: float
    attention_backward: float
    hbm: float
    nvlink: float
    network: float


@dataclass(frozen=True)
class Gpu:
    """A GPU in its usual node.

    Attributes:
        name: as the device calls itself.
        memory_bytes: that a process can have.
        bf16_flops, fp8_flops: dense peaks in FLOP/s; None: it has no such arithmetic.
        fp8_scalings: of training.fp8.scaling, those that it has.
        hbm_bytes_per_s: of its memory.
        nvlink_bytes_per_s: to the others of its node, one direction.
        network_bytes_per_s: of its network adapter, one direction.
        gpus_per_node: that NVLink connects.
        achieved: which share of all this training gets.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float | None
    fp8_scalings: tuple[str, ...]
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    gpus_per_node: int
    achieved: Achieved


def gpu_names() -> list[str]:
    """Names of the GPUs; `gpu_by_name` takes short ones, too."""
    return list(_table()["gpus"])


def gpu_by_name(name: str) -> Gpu:
    """A GPU of the preset file; "h100" is the usual one of that kind.

    Raises:
        InputError: there is none of that name.
    """
    gpus, short = _table()["gpus"], _table()["short_names"]
    full = short.get(name.lower(), name.lower())
    if full not in gpus:
        raise InputError(
            f"hardware.gpu: {name!r} is not known; there are {', '.join(gpus)}, in short {', '.join(short)}"
        )
    g = gpus[full]
    return Gpu(
        name=g["name"],
        memory_bytes=int(g["memory_gib"] * 2**30),
        bf16_flops=g["bf16_tflops"] * 1e12,
        fp8_flops=g["fp8_tflops"] and g["fp8_tflops"] * 1e12,
        fp8_scalings=tuple(g["fp8_scalings"]),
        hbm_bytes_per_s=g["hbm_gb_s"] * 1e9,
        nvlink_bytes_per_s=g["nvlink_gb_s"] * 1e9,
        network_bytes_per_s=g["network_gb_s"] * 1e9,
        gpus_per_node=g["gpus_per_node"],
        achieved=Achieved(**g["achieved"]),
    )


def peak_flops(device_name: str, precision: str) -> float | None:
    """What MFU is a share of: the dense bf16 peak of one device in FLOP/s, or None where none is known (CPUs,
    other precisions). It is that of bf16 also where training.fp8 computes linears in 8 bits, so that runs can
    be compared: their MFU counts the same FLOPs over the same peak.

    Args:
        device_name: as the device calls itself.
        precision: training.precision.
    """
    if precision != "bf16":
        return None
    peaks = _table()["bf16_tflops"].items()
    return next((tflops * 1e12 for name, tflops in peaks if name in device_name), None)


@functools.cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    return found
