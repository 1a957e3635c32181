"""LoRA (Hu et al. 2021): low-rank adapters beside the decoder's linears, tensor-parallel.

A linear y = W x with an adapter gives y + (alpha / rank) B A x, where A [rank, in] starts random and B
[out, rank] at zero. megatron-core fuses q, k, v and gate, up; each of them has an adapter of its own, which
adds to its rows of the fused output. Checkpoint names: "<linear>.lora.<target>.a" and ".b", for example
language.decoder.layers.0.self_attention.linear_qkv.lora.q.a; the rows of a B are in the order of the
separate projection (its heads one after the other), as Hugging Face has them.

Under tensor parallelism what is wide is split and what is summed is only `rank` wide:

    linear_qkv, linear_fc1   A whole on every rank, B by output rows; under sequence parallelism A runs on
                             the shard of the sequence, whose result is gathered
    linear_proj, linear_fc2  A by input columns, B whole on every rank; what A gives is summed (under
                             sequence parallelism: summed and scattered) before B

So whole tensors either get the same gradient on every rank, or that of a shard of the sequence and are
marked for megatron's finalize_model_grads to sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from megamm.batch import Batch
from megamm.config import LoraConfig, ModelConfig
from megamm.layers.norms import mark_sequence_parallel

# the linears of a decoder layer, and what each of them computes, in the order of its output rows
TARGETS = {
    "linear_qkv": ("q", "k", "v"),
    "linear_proj": ("o",),
    "linear_fc1": ("gate", "up"),
    "linear_fc2": ("down",),
}
_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


def adapted_targets(lora: LoraConfig, linear: str) -> list[str]:
    """What of a linear has an adapter, in the order of its rows; nothing if LoRA is off."""
    return [target for target in TARGETS[linear] if lora.rank and target in lora.targets]


@dataclass(frozen=True)
class OutputRows:
    """How a fused linear lays out its output features: `num_groups` times all of `widths`.

    Attributes:
        widths: target -> features in a group.
    """

    num_groups: int
    widths: dict[str, int]

    def size(self, target: str) -> int:
        """Features of a target."""
        return self.num_groups * self.widths[target]

    def add(self, out: torch.Tensor, updates: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`out` [..., all features] plus, for each target named, its update [..., its features]."""
        if len(self.widths) == 1:
            return out + next(iter(updates.values()))
        parts = out.unflatten(-1, (self.num_groups, -1)).split(list(self.widths.values()), dim=-1)
        added = [
            part + updates[target].unflatten(-1, (self.num_groups, -1)) if target in updates else part
            for target, part in zip(self.widths, parts, strict=True)
        ]
        return torch.cat(added, dim=-1).flatten(-2)


def output_rows(
    linear: str, hidden_size: int, heads: int, kv_heads: int, head_dim: int, ffn: int, tp_size: int = 1
) -> OutputRows:
    """The layout of a decoder linear, or of one rank's shard of it.

    linear_qkv goes group by group (the query heads of a key/value head, its key, its value), linear_fc1 has
    all of gate, then all of up.
    """
    if linear == "linear_qkv":
        widths = {"q": heads // kv_heads * head_dim, "k": head_dim, "v": head_dim}
        return OutputRows(kv_heads // tp_size, widths)
    if linear == "linear_fc1":
        return OutputRows(1, {"gate": ffn // tp_size, "up": ffn // tp_size})
    return OutputRows(1, {TARGETS[linear][0]: hidden_size})


# --- dropout ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DropoutKeys:
    """What decides which inputs of adapters are left out in a micro-batch: random numbers of its positions,
    from `position_keys`.

    Attributes:
        whole: [S, B] int32, of this rank's part of the sequence.
        shard: the rank's shard of these under sequence parallelism, else all of them.
    """

    whole: torch.Tensor
    shard: torch.Tensor


def position_keys(batch: Batch, seed: int) -> torch.Tensor:
    """[B, S] int32: a random number for every position of a micro-batch, the same in every layout.

    It depends on the seed, on where in the samples of the stage the step begins (`Batch.step_start`), on the
    sample and on the position in it, and on nothing else.
    """
    ids = batch.sample_ids
    if batch.packed:  # the padding behind the documents is one more
        document = (batch.position_ids[0] == 0).cumsum(0) - 1
        samples = torch.cat([ids, ids.new_full((1,), -1)])[document][None]
    else:
        samples = ids[:, None]
    key = torch.zeros_like(batch.position_ids)
    for part in (seed, batch.step_start, samples, batch.position_ids):
        key = _mixed(key + part)
    return key.to(torch.int32)


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of int64 that spreads every bit over all others (SplitMix64, Steele et al. 2014)."""
    x = x + -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def left_out(positions: torch.Tensor, features: torch.Tensor, share: float) -> torch.Tensor:
    """[S, B, F] bool, True for about `share` of the elements, from random numbers of positions [S, B] and of
    features [F], both int32."""
    # multiplied, so that the elements of a rectangle do not decide one another, as those of a sum would
    hashed = (positions[..., None] ^ features).mul_(0x7FEB352D)
    return hashed < round((share - 0.5) * 2**32)


# --- modules ------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A and B of one target, or this rank's shard of one of them."""

    def __init__(self, rank: int, in_size: int, out_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, in_size, dtype=dtype))
        self.b = nn.Parameter(torch.empty(out_size, rank, dtype=dtype))


class Adapters(nn.ModuleDict):
    """The adapters of one linear, by target.

    Args:
        config: of the decoder.
        linear: which of its linears, one of TARGETS.
        in_size: input features that this rank has.
        tp_group: tensor-parallel group.
    Attributes:
        layer_number: of the decoder layer; layers leave out different inputs.
        dropout_keys: of the micro-batch. Their layer sets them each time that it runs, also when it is
            computed again in the backward pass: by then, a pipeline has gone on to other micro-batches.
    """

    layer_number = 0
    dropout_keys: Optional[DropoutKeys] = None

    def __init__(self, config: Any, linear: str, in_size: int, tp_group: Any) -> None:
        super().__init__()
        self.lora: LoraConfig = config.lora
        self.linear, self.in_size, self.tp_group = linear, in_size, tp_group
        self.sequence_parallel = config.sequence_parallel
        self.is_column_parallel = linear in _COLUMN_PARALLEL
        self.rows = output_rows(
            linear,
            config.hidden_size,
            config.num_attention_heads,
            config.num_query_groups,
            config.kv_channels,
            config.ffn_hidden_size,
            tp_group.size(),
        )
        for target in adapted_targets(config.lora, linear):
            adapter = Adapter(config.lora.rank, in_size, self.rows.size(target), config.params_dtype)
            split, whole = (adapter.b, adapter.a) if self.is_column_parallel else (adapter.a, adapter.b)
            # without this mark the gradient norm would count rank 0's shard only
            set_tensor_model_parallel_attributes(split, True, 0 if self.is_column_parallel else 1, 1)
            mark_sequence_parallel(whole, config.sequence_parallel)
            self[target] = adapter

    def __getitem__(self, target: str) -> Adapter:
        adapter = super().__getitem__(target)
        assert isinstance(adapter, Adapter)
        return adapter

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """What the linear makes of x, with what the adapters add.

        Args:
            x: input of the linear.
            out: output of the linear, without adapters.
        """
        scale = self.lora.alpha / self.lora.rank
        if self.training and self.lora.dropout:
            x = x.masked_fill(self._left_out(x.device), 0.0)
            scale /= 1 - self.lora.dropout
        h = F.linear(x, torch.cat([self[target].a for target in self]))
        parts = (self._between(h) * scale).split(self.lora.rank, dim=-1)
        updates = {t: F.linear(part, self[t].b) for t, part in zip(self, parts, strict=True)}
        return self.rows.add(out, updates)

    def _between(self, h: torch.Tensor) -> torch.Tensor:
        """From what this rank's A gives to what its B takes."""
        if self.is_column_parallel:
            if self.sequence_parallel:
                return gather_from_sequence_parallel_region(h, group=self.tp_group)
            return copy_to_tensor_model_parallel_region(h, group=self.tp_group)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(h, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(h, group=self.tp_group)

    def _left_out(self, device: torch.device) -> torch.Tensor:
        """[S, B, in] bool: inputs that dropout leaves out, the same ones in every layout."""
        assert self.dropout_keys is not None, "Decoder.begin must come first"
        keys, first_feature = self.dropout_keys.shard, 0
        if not self.is_column_parallel:
            keys, first_feature = self.dropout_keys.whole, self.tp_group.rank() * self.in_size
        where = self.layer_number * len(TARGETS) + list(TARGETS).index(self.linear)
        features = torch.arange(first_feature, first_feature + self.in_size, device=device)
        return left_out(keys, _mixed(_mixed(features) + where).to(torch.int32), self.lora.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Optional[dict[str, Any]] = None
    ) -> dict[str, Any]:
        """megatron's description of these tensors for checkpoints."""
        split, dim = ("b", 0) if self.is_column_parallel else ("a", 1)
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {f"{target}.{split}": dim for target in self},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def with_adapters(base: Any, linear: str) -> type[nn.Module]:
    """A backend's parallel linear `base`, with adapters for `linear` of the decoder."""

    class AdaptedLinear(base):  # type: ignore[misc]
        def __init__(self, in_size: int, *args: Any, config: Any, tp_group: Any, **kwargs: Any) -> None:
            super().__init__(in_size, *args, config=config, tp_group=tp_group, **kwargs)
            own = in_size if linear in _COLUMN_PARALLEL else in_size // tp_group.size()
            self.lora = Adapters(config, linear, own, tp_group)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
            out, bias = super().forward(x)
            return self.lora(x, out), bias

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: Optional[dict[str, Any]] = None
        ) -> dict[str, Any]:
            # the base class takes everything that it does not know for replicated
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            return {**state, **self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)}

    return AdaptedLinear


# --- merging ------------------------------------------------------------------------------------------

_WEIGHT = re.compile(r"language\.decoder\.layers\.\d+\.(?:self_attention|mlp)\.(linear_\w+)\.weight")


def merged(name: str, read: Callable[[str], torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The weight `name` as a model without adapters needs it: W + (alpha / rank) B A, where it has some.

    Args:
        name: checkpoint name of any weight that is no adapter's.
        read: gives a whole tensor by its checkpoint name; called for the weight and its adapters.
        model: of the checkpoint.
    Returns:
        The weight in its own dtype, summed up in fp32; unchanged, and not copied, if it has no adapter.
    """
    weight = read(name)
    found = _WEIGHT.fullmatch(name)
    targets = adapted_targets(model.lora, found[1]) if found else []
    if not found or not targets:
        return weight
    m, stem = model.language, name.removesuffix("weight") + "lora."
    rows = output_rows(
        found[1], m.hidden_size, m.num_heads, m.num_kv_heads or m.num_heads, m.head_dim, m.ffn_hidden_size
    )
    scale = model.lora.alpha / model.lora.rank
    updates = {
        target: (read(f"{stem}{target}.b").float() @ read(f"{stem}{target}.a").float()).t() * scale
        for target in targets
    }
    return rows.add(weight.float().t(), updates).t().to(weight.dtype).contiguous()
