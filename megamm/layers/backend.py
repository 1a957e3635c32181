"""Backends: which classes the decoder is built from, chosen once, by name.

Both implement megatron-core's BackendSpecProvider. `local` is megatron's parallel linears with megamm's
norms and torch's attention; `te` is Transformer Engine. Models never ask which one they got.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from torch import nn

from megamm.errors import InputError
from megamm.layers.attention import SDPACoreAttention
from megamm.layers.linear import ColumnLinear, RowLinear
from megamm.layers.norms import RMSNorm


class LocalBackend(LocalSpecProvider):
    """megatron-core's linears, plain where they can be, megamm's RMSNorm, torch's attention."""

    def column_parallel_linear(self) -> type:
        return ColumnLinear

    def row_parallel_linear(self) -> type:
        return RowLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        if not rms_norm:
            raise ValueError("megamm's decoders use RMSNorm")
        return RMSNorm

    def core_attention(self) -> type:
        return SDPACoreAttention


def backend_by_name(name: str) -> BackendSpecProvider:
    """The provider called `name` ("local" or "te"); what works is decided in megamm.device."""
    if name == "local":
        return LocalBackend()
    if name == "te":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    raise InputError(f"parallel.backend: unknown backend {name!r}; use auto, te or local")


def column_parallel(
    backend: BackendSpecProvider, config: Any, in_size: int, out_size: int, tp_group: Any, bias: bool = False
) -> nn.Module:
    """A linear whose output features, bias included, are sharded over the tensor-parallel group."""
    return backend.column_parallel_linear()(
        in_size,
        out_size,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        bias=bias,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
    )


def row_parallel(
    backend: BackendSpecProvider, config: Any, in_size: int, out_size: int, tp_group: Any, bias: bool = False
) -> nn.Module:
    """A linear whose input features are sharded; sums over the tensor-parallel group, then adds the bias."""
    return backend.row_parallel_linear()(
        in_size,
        out_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=bias,
        input_is_parallel=True,
        skip_bias_add=False,
        is_expert=False,
        tp_group=tp_group,
    )
