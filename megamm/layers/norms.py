"""Norms with the constructor that megatron-core's layer specs call."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import nn

from megamm.ops import layer_norm
from megamm.ops.rms_norm import rms_norm


def mark_sequence_parallel(parameter: nn.Parameter, enabled: bool) -> nn.Parameter:
    """Mark a replicated parameter that acts on sequence-sharded activations.

    Each tensor-parallel rank then sees only its part of the sequence, so the gradient must be summed
    over the ranks; megatron's finalize_model_grads does so for parameters with this attribute.
    """
    parameter.sequence_parallel = enabled  # type: ignore[attr-defined]
    return parameter


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019) on megamm's fused op.

    Args:
        config: decides only whether the weight is marked as sequence-parallel.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight = mark_sequence_parallel(weight, config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(layer_norm.LayerNorm):
    """LayerNorm in the model's dtype, optionally marked as sequence-parallel."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            mark_sequence_parallel(parameter, config.sequence_parallel)
