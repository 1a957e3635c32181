"""The experiments of `gpu.py`: each measures in the process that calls it, on a GPU at full size or on a
CPU at a tiny one, by the same code."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ops
import torch
from gpu_models import TRAININGS, Training
from op_cases import CASES
from ops import copy_bandwidth, seconds_of
from sides import DTYPES, Ours, assert_equal
from step_cases import Plain
from step_sizes import IMAGE_ID, Mixture

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.device import choose_backend, distributed_backend, fp8_status, pick_device, require_fp8
from megamm.engine import groups
from megamm.ops.linear_cross_entropy import linear_cross_entropy
from megamm.planning.flops import flops_per_step
from megamm.planning.hardware import gpu_by_name

Found = dict[str, Any]
STEPS, WARM_UP = 8, 3
GATE = "language.decoder.layers.{}.gated_cross_attention.attention.to_kv.weight"


def wait(device: torch.device) -> None:
    """Until the device has done all it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step_seconds(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Median seconds of a step by the clock, the first few not counted."""
    times = []
    for number in range(WARM_UP + steps):
        wait(device)
        started = time.perf_counter()
        step()
        wait(device)
        if number >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


# --- ceilings ---------------------------------------------------------------------------------------------


def ceilings(tiny: bool) -> Found:
    """What the device reaches in a copy, and in matrix products of bf16 and of FP8."""
    device = pick_device()
    kind, size = device.type, 256 if tiny else 8192
    found: Found = {"copy GB/s": copy_bandwidth((1 << 22) if tiny else (1 << 31), kind) / 1e9}
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    best = min(seconds_of(lambda: a @ b, kind) for _ in range(3))
    found["bf16 TFLOP/s"] = 2 * size**3 / best / 1e12
    if kind == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        one, low = torch.ones((), device=device), torch.float8_e4m3fn
        x, y = a.to(low), b.to(low).t().contiguous().t()  # the second by columns

        def product() -> torch.Tensor:
            return torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

        found["fp8 TFLOP/s"] = 2 * size**3 / min(seconds_of(product, kind) for _ in range(3)) / 1e12
    return found


# --- operators --------------------------------------------------------------------------------------------


def operators(tiny: bool) -> Found:
    """Every fused operator: shares of the copy, times as fast as its peers."""
    kind = pick_device().type
    ops.keep_freed_memory()
    bandwidth = copy_bandwidth((1 << 24) if tiny else (1 << 30), kind)
    rows, size = [], torch.bfloat16.itemsize
    for case in CASES(kind, 64 if tiny else None)[: 4 if tiny else None]:
        result = ops.measure(case, torch.bfloat16, kind, 1 if tiny else 4, compiled=False)
        ours = result.of(ops.OURS)
        backward = ours.both - ours.forward  # (of the fastest turns, which may not be the same one)
        rows.append(
            {
                "op": f"{case.name} {case.shape}",
                "forward": case.forward_elements * size / ours.forward / bandwidth,
                "backward": case.backward_elements * size / backward / bandwidth if backward > 0 else None,
                "peers": {
                    r.side: r.both / ours.both for r in result.rows if r.side != ops.OURS and not r.note
                },
            }
        )
    return {"copy GB/s": bandwidth / 1e9, "rows": rows}


def fused_loss(tiny: bool) -> Found:
    """The output layer with its loss: time forward and backward, and memory beyond its inputs and their
    gradients."""
    device = pick_device()
    tokens, width, vocab = (256, 64, 1000) if tiny else (16384, 4096, 32000)
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab, width, device=device) * width**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (tokens,), device=device)

    def both() -> None:
        losses = linear_cross_entropy(hidden, weight, labels)
        torch.autograd.grad(losses.sum(), [hidden, weight])

    both()
    found: Found = {"tokens": tokens, "vocabulary": vocab, "ms": 1e3 * seconds_of(both, device.type)}
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        gradients = hidden.nbytes + weight.nbytes
        found["extra GB"] = (torch.cuda.max_memory_allocated() - before - gradients) / 1e9
    return found


# --- training ---------------------------------------------------------------------------------------------


def training(name: str, tiny: bool) -> Found:
    """Positions and samples a second, share of the peak, memory."""
    device, plan = pick_device(), TRAININGS[name]
    backend = choose_backend("te" if plan.fp8 != "off" or name == "bf16 layers" else "auto")[0] if (
        device.type == "cuda"
    ) else "local"  # fmt: skip
    recipe = plan.recipe(tiny, backend)
    require_fp8(recipe.training.fp8.scaling, backend, device)
    ours, mixed = prepared(recipe, plan, device, backend)
    seconds = step_seconds(lambda: ours.step(mixed.packed), device, 2 if tiny else STEPS)
    found = speed(recipe, mixed, seconds, device) | {"backend": backend, "parameters": ours.num_parameters}
    if name == "flamingo":
        found |= dense_mask(recipe, ours, mixed, device, tiny) | {"packed ms": 1e3 * seconds}
        found["times the peer"] = found["dense mask ms"] / found["packed ms"]
    groups.shutdown()
    return found


def prepared(recipe: Recipe, plan: Training, device: torch.device, backend: str) -> tuple[Ours, Mixture]:
    """The model on the device, and its batches there."""
    layout = groups.initialize(recipe.parallel, device, distributed_backend(device))
    mixed = plan.batches(recipe)
    there = Mixture(_on(mixed.packed, device), _on(mixed.padded, device), mixed.positions)
    return Ours(recipe, layout, None, IMAGE_ID, backend), there


def _on(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    return [batch.to(device) for batch in batches]


def speed(recipe: Recipe, mixed: Mixture, seconds: float, device: torch.device) -> Found:
    """Of a step over the samples: padding counts as time, not as work."""
    images = sum(batch.num_images for batch in mixed.packed)
    labels = sum(batch.num_labels for batch in mixed.packed)
    pairs = sum(batch.num_pairs for batch in mixed.packed)
    flops = flops_per_step(recipe, mixed.positions, images, labels, pairs)
    found: Found = {
        "tokens/s": mixed.positions / seconds,
        "samples/s": sum(len(batch.input_ids) for batch in mixed.padded) / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "full": mixed.positions / sum(batch.input_ids.numel() for batch in mixed.packed),
    }
    if device.type == "cuda":
        found["MFU"] = flops / seconds / gpu_by_name("h200").bf16_flops
        found["GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def dense_mask(recipe: Recipe, ours: Ours, mixed: Mixture, device: torch.device, tiny: bool) -> Found:
    """The same samples padded, in plain torch with a dense mask, after loss and a gradient were found
    equal."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    peer = Plain(recipe, ours, DTYPES["bf16"])
    name = GATE.format(next(n for n in range(99) if recipe.model.cross_attention.stands_before(n)))
    mine = ours.backward(mixed.packed), ours.gradients()[name]
    theirs = peer.backward(mixed.padded), peer.gradients()[name]
    departure = assert_equal(mine, theirs, "bf16", "plain torch, dense mask")
    seconds = step_seconds(lambda: peer.step(mixed.padded), device, 2 if tiny else STEPS)
    return {"dense mask ms": 1e3 * seconds, "departure": departure}


def refusal_of_fp8() -> str:
    """Why FP8 does not work here; empty where it does."""
    status = fp8_status()["delayed"]
    return "" if status.works else status.reason


EXPERIMENTS: dict[str, Callable[[bool], Found]] = {
    "ceilings": ceilings,
    "operators": operators,
    "fused loss": fused_loss,
    **{name: partial(training, name) for name in TRAININGS},
}
