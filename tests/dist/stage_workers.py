"""What the processes of the tests of stages run: steps with a reference beside them, hand-overs."""

from __future__ import annotations

import math
from typing import Any

import torch

from megamm.config import EMBEDDING
from megamm.engine import groups, handover
from megamm.engine.checkpoint import resolve
from megamm.training.handover import carry_out, plan_handover
from tests.dist.tiny import tiny_recipe
from tests.dist.workers import Run, gradients_of

STEPS = 5
LR, MIN_LR, DECAY = 0.01, 0.001, 0.2
RATES: dict[str, Any] = {
    "optimizer.lr": LR,
    "optimizer.min_lr": MIN_LR,
    "optimizer.weight_decay": DECAY,
    "optimizer.clip_grad": 0,
    "optimizer.no_decay": "[vectors, embeddings, latents]",
    "optimizer.parts": "[{part: vision, lr: 0.002}, {part: connector, lr: 0.03, min_lr: 0.02}, "
    "{part: cross_attention, weight_decay: 0.7}]",
    "training.steps": STEPS,
}


def _settings(name: str, data: torch.Tensor) -> tuple[float, float, float]:
    """(highest rate, lowest rate, weight decay) that RATES mean for a weight."""
    decay = DECAY
    peak, lowest = LR, MIN_LR
    if name.startswith("vision."):
        peak, lowest = 0.002, 0.0002
    elif name.startswith("connector."):
        peak, lowest = 0.03, 0.02
    elif ".gated_cross_attention." in name:
        decay = 0.7
    if data.dim() == 1 or name in (EMBEDDING, "connector.latents"):
        decay = 0.0
    return peak, lowest, decay


def largest_error_of_rates(kind: str, overrides: dict[str, Any]) -> tuple[float, list[int]]:
    """Train with RATES; compare every weight after every step with torch's AdamW on the same gradients.

    Returns:
        The largest difference, and the number of weights that this rank has in each parameter group.
    """
    run = Run(tiny_recipe(kind, {**RATES, **overrides}))
    # gradients exist for what is trained; the reference has the same order
    names, references, settings = [], [], []
    for name, _, index, data in run.shards(lambda p: p.data if p.requires_grad else None):
        names.append((name, index))
        references.append(torch.nn.Parameter(data))
        settings.append(_settings(name, data))
    reference = torch.optim.AdamW([{"params": [p]} for p in references], betas=(0.9, 0.95), eps=1e-8)
    worst = 0.0
    for step in range(STEPS):
        run.forward_backward(step)
        gradients = gradients_of(run)
        assert [(name, index) for name, _, index, _ in gradients] == names
        for group, (peak, lowest, decay), (_, _, _, gradient) in zip(
            reference.param_groups, settings, gradients, strict=True
        ):
            group["lr"] = lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            group["weight_decay"] = decay
            group["params"][0].grad = gradient
        reference.step()
        run.optimizer.step()
        assert run.schedule.get_lr({}) == max(
            group["lr"] for group in run.optimizer.param_groups if group["max_lr"] == LR
        )
        run.schedule.step(1)
        now = run.shards(lambda p: p.data if p.requires_grad else None)
        for parameter, (_, _, _, data) in zip(references, now, strict=True):
            worst = max(worst, float((parameter.detach() - data).abs().max()))
    sizes = [len(group["params"]) for group in run.optimizer.param_groups]
    groups.shutdown()
    return worst, sizes


def hand_over_and_go_on(
    kind: str, overrides: dict[str, Any], directory: str, first_step: int, more: int
) -> dict[str, Any]:
    """Begin a stage with a checkpoint, and train it on the batches from `first_step` on."""
    run = Run(tiny_recipe(kind, {"seed": 99, "training.init_from": directory, **overrides}))
    stage = handover.open_stage(resolve(directory))
    plan = plan_handover(stage, run.recipe, handover.wanted_by(run.models, run.layout))
    carry_out(plan, stage, run.recipe, run.models, run.optimizer, run.layout)
    weights = run.shards()
    curve = [run.step(step) for step in range(first_step, first_step + more)]
    result = {"weights": weights, "curve": curve, "last": run.shards(), "lines": plan.lines}
    groups.shutdown()
    return result


def train(kind: str, overrides: dict[str, Any], steps: int) -> dict[str, Any]:
    """Weights before and after some steps; gradients of the first."""
    run = Run(tiny_recipe(kind, overrides))
    before = run.shards()
    run.forward_backward(0)
    is_fp32 = run.recipe.training.precision == "fp32"
    gradients = gradients_of(run) if is_fp32 else []
    curve = [run.step(step) for step in range(steps)]
    result = {"before": before, "gradients": gradients, "after": run.shards(), "curve": curve}
    groups.shutdown()
    return result
