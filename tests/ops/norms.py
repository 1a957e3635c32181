"""What the tests of the norms and gates share: shapes, views, the comparison with a definition in fp64."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm import ops

ROOT = Path(__file__).resolve().parents[2]
EPS = 1e-5
SHAPES = [(1, 1), (3, 5, 67), (2, 4096), (130, 17), (2, 3, 4, 8), (700, 33), (64,), (5, 16385)]
CUDA_SHAPES = [*SHAPES, (513, 4096), (65, 8192), (9, 16384), (3, 70000), (4099, 128)]
# Largest error, relative to the largest element (absolute below 1: gradients of short rows cancel).
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
fused = pytest.mark.skipif(not ops.extension_built(), reason=ops.extension_status())
Op = Callable[..., Any]


def run(op: Op, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of op(*inputs) and the gradients of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    result = op(*leaves)
    outputs = [result] if isinstance(result, torch.Tensor) else list(result)
    gradients = torch.autograd.grad(
        outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    )
    return [*(o.detach() for o in outputs), *gradients]


def assert_matches(
    op: Op,
    definition: Op,
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    roundings: int = 1,
) -> None:
    """Outputs and gradients of op are those of the definition in fp64, rounded so many times."""
    want = run(definition, [t.double() for t in inputs], [g.double() for g in grads])
    got = run(op, inputs, grads)
    for i, (ours, exact) in enumerate(zip(got, want, strict=True)):
        assert ours.shape == exact.shape, i
        scale = exact.abs().max().clamp(min=1) if exact.numel() else 1
        error = (ours.double() - exact).abs().max() / scale if exact.numel() else 0
        assert error <= TOLERANCE[ours.dtype] * roundings, f"tensor {i}: {error:.2e}"


def strided_views() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Views of a [6, 8, 96] tensor that have a last dimension of 32."""
    return {
        "slice of rows": lambda t: t[..., 32:64],
        "every third element": lambda t: t[..., ::3],
        "transposed leading": lambda t: t.transpose(0, 1)[..., :32],
        "unaligned": lambda t: t.flatten()[1:65].view(2, 32),
        "expanded": lambda t: t[:1, :1, :32].expand(3, 5, 32),
    }


def assert_independent_of_threads(
    op: Op, inputs: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
) -> None:
    """The same bits in every run and with any number of threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            results.append(run(op, inputs, grads))
    finally:
        torch.set_num_threads(threads)
    if not ops.extension_built():
        results = results[2:]  # torch promises it for the same number of threads only
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


compiled = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    # no kernel asks which it is compiled for; these take longest
    pytest.mark.parametrize("arch", [pytest.param("80", marks=pytest.mark.slow), "90a"]),
    pytest.mark.timeout(600),
]


def assert_kernel_compiles(op: str, arch: str, folder: Path, kernels: int) -> None:
    """With plain nvcc and no torch header; warnings are errors, and no register is spilled."""
    target = folder / f"{op}_{arch}.o"
    command = ["nvcc", "-c", "-O3", "-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"csrc/{op}/kernel.cu", "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert len(spills) >= kernels and set(spills) == {("0", "0")}, done.stderr
