"""Seconds of a `Work` on a GPU.

matrix product   2 rows inputs outputs / (peak x share) + bytes of its three matrices / memory rate
attention        4 pairs width forward, 10 backward (scores once more), / (peak x share)
other operators  bytes / memory rate
collective       bytes that arrive / link rate + its start
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megamm.planning.hardware import Gpu
from megamm.planning.work import ELEMENT, FP8_CASTS, Gemm, Work

KERNEL_S = 4e-6  # until the next kernel runs
COLLECTIVE_S = 20e-6  # until the first bytes of a collective arrive
ACCUMULATE_BYTES = 10  # for each weight: a 16-bit gradient is added to the fp32 buffer, in each micro-batch


@dataclass(frozen=True)
class Seconds:
    """Time by what it is spent on; `tensor` is waiting for the tensor- and context-parallel group."""

    products: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.attention + self.memory + self.tensor

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.products + other.products,
            self.attention + other.attention,
            self.memory + other.memory,
            self.tensor + other.tensor,
        )

    def __mul__(self, times: float) -> Seconds:
        return Seconds(
            self.products * times, self.attention * times, self.memory * times, self.tensor * times
        )


NOTHING = Seconds()


def add(parts: Iterable[Seconds]) -> Seconds:
    """Their sum."""
    return sum(parts, NOTHING)


def forward_time(work: Work, gpu: Gpu, group_rate: float) -> Seconds:
    """Of the forward pass; `group_rate`: bytes/s that reach a rank from its group."""
    products = sum(_product(g, gpu) for g in work.gemms)
    rate = gpu.bf16_flops * gpu.achieved.attention_forward
    attention = sum(4 * a.pairs * a.width / rate + KERNEL_S for a in work.attentions)
    return Seconds(
        products,
        attention,
        work.moved_forward / memory_rate(gpu),
        work.sent_forward / group_rate + work.calls_forward * COLLECTIVE_S,
    )


def backward_time(work: Work, gpu: Gpu, group_rate: float) -> Seconds:
    """Of the backward pass: the products and operators whose gradients are needed."""
    products = sum(_product(g, gpu) * (g.input_gradient + g.weight_gradient) for g in work.gemms)
    rate = gpu.bf16_flops * gpu.achieved.attention_backward
    attention = sum(10 * a.pairs * a.width / rate + KERNEL_S for a in work.attentions if a.gradient)
    moved = work.moved_backward + ACCUMULATE_BYTES * work.trained
    return Seconds(
        products,
        attention,
        moved / memory_rate(gpu),
        work.sent_backward / group_rate + work.calls_backward * COLLECTIVE_S,
    )


def link_rate(gpu: Gpu, stride: int, size: int) -> float:
    """Bytes/s that reach a rank in a collective of `size` ranks, every `stride`-th one of the run. A group
    that leaves its node has the adapters of all its members there."""
    nvlink = gpu.nvlink_bytes_per_s * gpu.achieved.nvlink
    if stride * size <= gpu.gpus_per_node:
        return nvlink
    members = max(1, gpu.gpus_per_node // stride)
    return min(nvlink, members * gpu.network_bytes_per_s * gpu.achieved.network)


def _product(g: Gemm, gpu: Gpu) -> float:
    flops, elements = (
        2 * g.rows * g.inputs * g.outputs,
        g.rows * (g.inputs + g.outputs) + g.inputs * g.outputs,
    )
    if g.eight_bit and gpu.fp8_flops and gpu.achieved.fp8_gemm:
        # inputs, weights and gradients are cast once each, for three products: read as 16 bits, written as 8
        # both ways round
        casts = (ELEMENT + FP8_CASTS) * elements / 3
        moved = casts + g.rows * g.inputs + g.inputs * g.outputs + ELEMENT * g.rows * g.outputs
        return flops / (gpu.fp8_flops * gpu.achieved.fp8_gemm) + moved / memory_rate(gpu) + KERNEL_S
    return flops / (gpu.bf16_flops * gpu.achieved.gemm) + ELEMENT * elements / memory_rate(gpu) + KERNEL_S


def memory_rate(gpu: Gpu) -> float:
    """Bytes/s of memory-bound operators."""
    return gpu.hbm_bytes_per_s * gpu.achieved.hbm
