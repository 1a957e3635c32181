"""Parallel linears that are plain ones where nothing is parallel about them.

megatron-core's go through an autograd function in Python, which knows how to overlap communication and where
gradients are accumulated, in every forward and backward pass: for single tokens on a CPU that is longer than
the product itself takes. With one tensor-parallel rank, and without gradients, there is nothing to overlap.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import nn

from megamm.ops.linear import linear

LinearOutput = tuple[torch.Tensor, Optional[torch.Tensor]]  # and the bias that is still to be added


class ColumnLinear(ColumnParallelLinear):
    """Output features sharded over the tensor-parallel group."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: Optional[torch.Tensor] = None,
        runtime_gather_output: Optional[bool] = None,
    ) -> LinearOutput:
        """[S, B, in] to [S, B, out / tp]."""
        gathers = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if not _is_plain(self) or (gathers and self.tp_group.size() > 1):
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.skip_bias_add:
            return linear(input_, weight), self.bias
        return linear(input_, weight, self.bias), None


class RowLinear(RowParallelLinear):
    """Input features sharded; sums over the tensor-parallel group."""

    def forward(self, input_: torch.Tensor) -> LinearOutput:
        """[S, B, in / tp] to [S, B, out]."""
        if not _is_plain(self) or not self.input_is_parallel:
            return super().forward(input_)
        if self.tp_group.size() == 1 and not self.skip_bias_add:
            return linear(input_, self.weight, self.bias), None
        out = linear(input_, self.weight)
        if self.tp_group.size() > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        if self.skip_bias_add:
            return out, self.bias
        return out if self.bias is None else out + self.bias, None


def _is_plain(layer: Any) -> bool:
    if layer.gradient_accumulation_fusion:
        return False
    return layer.tp_group.size() == 1 or not (torch.is_grad_enabled() or layer.sequence_parallel)


class Linear(nn.Linear):
    """torch's, by megamm's op."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        return linear(x, self.weight, self.bias)
