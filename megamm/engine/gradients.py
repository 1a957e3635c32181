"""Gradients after the backward pass."""

from __future__ import annotations

import torch

MANY = 8  # names that are worth reading


def non_finite_gradients(models: list[torch.nn.Module]) -> list[str]:
    """Names of parameters of this rank's chunks whose gradients, as far as this rank has them, are not all
    finite numbers: the first ones. Waits for the device."""
    found = []
    for model in models:
        for name, parameter in model.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                found.append(name)
    return found[:MANY]
