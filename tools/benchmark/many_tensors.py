#!/usr/bin/env python
"""Would kernels of our own help where many tensors are gone through at once: AdamW and the gradient norm?

    python tools/benchmark/many_tensors.py [--device cpu] [--millions 64]

Measures torch's fused kernels, which megamm uses, on the tensors of a decoder (a few large, many small)
against a plain copy in the same run: what is left to the copy is all that another kernel could gain.
"""

from __future__ import annotations

import argparse

import torch
from common import Result, Table, add_json, load
from ops import copy_bandwidth, keep_freed_memory, machine_name, seconds_of

WIDTH = 1024


def tensors_of(num_parameters: int, device: str) -> list[torch.Tensor]:
    """Layers of four matrices and two vectors."""
    layer = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,), (8 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,)]
    found: list[torch.Tensor] = []
    while sum(tensor.numel() for tensor in found) < num_parameters:
        found += [torch.randn(*shape, device=device) for shape in layer]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--millions", type=int, default=64, help="parameters")
    add_json(parser)
    args = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()
    parameters, gradients, first = (tensors_of(args.millions * 10**6, args.device) for _ in range(3))
    second = [tensor.square() for tensor in first]
    steps = [torch.ones((), device=args.device) for _ in parameters]
    size = 4 * sum(tensor.numel() for tensor in parameters)
    settings = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}

    def adamw() -> None:
        torch._fused_adamw_(
            parameters, gradients, first, second, [], steps, amsgrad=False, maximize=False, **settings
        )

    def norm() -> torch.Tensor:
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    setting = f"{machine_name(args.device)}; {len(parameters)} tensors, {size / 4e6:.0f}M parameters, fp32"
    print(setting)
    bandwidth = copy_bandwidth(256 << 20, args.device)
    print(f"plain copy: {bandwidth / 1e9:.1f} GB/s")
    copy = f"plain copy: {bandwidth / 1e9:.1f} GB/s"
    table = Table(copy, ["what", "ms", "GB/s", "% of the copy"])
    for name, run, num_bytes in (
        ("fused AdamW (4 read, 3 written)", adamw, 7 * size),
        ("norm of all gradients (1 read)", norm, size),
    ):
        seconds = min(seconds_of(run, args.device) for _ in range(7))
        rate = num_bytes / seconds
        print(f"{name}: {seconds * 1e3:.1f} ms, {rate / 1e9:.1f} GB/s, {rate / bandwidth:.0%} of the copy")
        table.add(name, f"{seconds * 1e3:.1f}", f"{rate / 1e9:.1f}", f"{100 * rate / bandwidth:.0f}")
    Result(f"{setting}; load {load()}", [table]).write(args.json)


if __name__ == "__main__":
    main()
