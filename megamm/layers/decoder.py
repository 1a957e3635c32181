"""The decoder: megatron-core's GPTModel with gated cross-attention layers and a padded vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import LanguageConfig
from megamm.config.parts import padded_vocab_size
from megamm.engine.groups import Groups
from megamm.engine.transformer_config import DecoderConfig
from megamm.layers.backend import backend_by_name
from megamm.layers.cache import DecodingCache
from megamm.layers.context import context_slice
from megamm.layers.cross_attention import GatedCrossAttention, MediaMask
from megamm.layers.linear import ColumnLinear
from megamm.layers.lora import Adapters, DropoutKeys, adapted_targets, position_keys, with_adapters
from megamm.layers.norms import RMSNorm
from megamm.layers.recompute import recomputed
from megamm.layers.rotary import RotarySelfAttention
from megamm.ops.linear_cross_entropy import linear_cross_entropy
from megamm.ops.rms_norm import rms_norm_add
from megamm.ops.rope import rope_table
from megamm.ops.swiglu import swiglu


class DecoderLayer(TransformerLayer):
    """A decoder layer, preceded by a gated cross-attention block where the geometry asks for one.

    The block belongs to the layer (instead of being a layer of its own) so that the language model's
    layer numbers, and with them pipeline layouts and checkpoint keys, are those of the plain model.
    """

    def __init__(
        self, config: DecoderConfig, submodules: Any, backend_name: str = "local", **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        geometry = config.gated_cross_attention
        # layer_number counts from 1 over the whole model, also on later pipeline stages
        if geometry is not None and geometry.stands_before(self.layer_number - 1):
            self.gated_cross_attention: Optional[GatedCrossAttention] = GatedCrossAttention(
                config, backend_by_name(backend_name), geometry, config.media_width, self.tp_group
            )
            self.gated_cross_attention.attention.layer_number = self.layer_number
        else:
            self.gated_cross_attention = None
        # the number that is passed in counts within the pipeline chunk
        self.is_recomputed = kwargs.get("layer_number", 1) <= config.recomputed_layers
        self.mlp.is_recomputed = self.recompute_mlp  # type: ignore[has-type]
        self.recompute_mlp = False
        self.dropout_keys: Optional[DropoutKeys] = None  # of the micro-batch that comes next
        self._normed: Optional[torch.Tensor] = None
        if isinstance(self.pre_mlp_layernorm, RMSNorm):
            self.self_attn_bda = lambda *_: self._add_and_norm
        _number_adapters(self, self.layer_number)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        run, keys = self._forward, self.dropout_keys
        if self.is_recomputed and self.training:
            return recomputed(run, hidden_states, keys, *args, fp8=bool(self.config.fp8), **kwargs)
        return run(hidden_states, keys, *args, **kwargs)

    def _forward(
        self,
        hidden_states: torch.Tensor,
        dropout_keys: Optional[DropoutKeys],
        attention_mask: Optional[torch.Tensor] = None,
        context: Optional[torch.Tensor] = None,
        context_mask: Optional[MediaMask] = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        _set_dropout_keys(self.self_attention, dropout_keys)
        self.mlp.dropout_keys = dropout_keys
        if self.gated_cross_attention is not None:
            hidden_states = self.gated_cross_attention(hidden_states, context, context_mask)
        hidden_states, _ = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)
        return hidden_states, context

    def decode_next(
        self, hidden_states: torch.Tensor, table: torch.Tensor, mask: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """[1, B, H] of one further token of each row: what `forward` does with a cache, without what
        megatron's layer does for training, which takes longer than the products."""
        if self.gated_cross_attention is not None:
            hidden_states = self.gated_cross_attention(hidden_states, None, None)
        attended = self.self_attention.decode_next(self.input_layernorm(hidden_states), table, mask)
        total = self._add_and_norm(attended, hidden_states, 0.0)
        out, bias = self.mlp(self._forward_pre_mlp_layernorm(total))
        return total + out if bias is None else total + (out + bias)

    def _add_and_norm(
        self,
        attended: tuple[torch.Tensor, Optional[torch.Tensor]],
        residual: torch.Tensor,
        dropout: float,
    ) -> torch.Tensor:
        """The residual addition behind attention, in megatron's slot, and the norm before the MLP with it."""
        assert dropout == 0
        out, bias = attended
        if bias is not None:
            out = out + bias
        norm = self.pre_mlp_layernorm
        self._normed, total = rms_norm_add(out, residual, norm.weight, norm.eps)
        return total

    def _forward_pre_mlp_layernorm(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed, self._normed = self._normed, None
        found: torch.Tensor = super()._forward_pre_mlp_layernorm(hidden_states) if normed is None else normed
        return found


class BiasedSelfAttention(RotarySelfAttention):
    """Self-attention with biases on all four projections, in a decoder whose MLP has none (InternLM)."""

    def __init__(self, config: DecoderConfig, *args: Any, **kwargs: Any) -> None:
        with_biases = copy.copy(config)
        with_biases.add_bias_linear = True
        super().__init__(with_biases, *args, **kwargs)


class DecoderMLP(MLP):
    """megatron's MLP, which recomputes itself where megatron's layer would do it: with megatron's reentrant
    checkpoint, adapters whose input needs no gradient silently get none, and run with the dropout of another
    micro-batch."""

    is_recomputed = False
    dropout_keys: Optional[DropoutKeys] = None

    @classmethod
    def of(cls, linears: MLPSubmodules, tp_group: Any) -> type[DecoderMLP]:
        """The class as megatron's layer takes it without a warning: everything but the configuration set."""

        class Complete(cls):  # type: ignore[misc, valid-type]
            def __init__(self, config: DecoderConfig) -> None:
                super().__init__(config, linears, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)

        return Complete

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """[S, B, H] to [S, B, H] and the bias that is still to be added."""
        if self.is_recomputed and self.training:
            fp8 = bool(self.config.fp8)
            return recomputed(self._forward, hidden_states, self.dropout_keys, fp8=fp8)
        return self._forward(hidden_states, self.dropout_keys)

    def _forward(
        self, hidden_states: torch.Tensor, dropout_keys: Optional[DropoutKeys]
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        _set_dropout_keys(self, dropout_keys)
        return super().forward(hidden_states)


def _adapters(module: nn.Module) -> Iterator[Adapters]:
    for child in module.children():  # adapters hang on the linears of attention and MLP, no deeper
        if isinstance(found := getattr(child, "lora", None), Adapters):
            yield found


def _number_adapters(layer: TransformerLayer, layer_number: int) -> None:
    for adapters in (*_adapters(layer.self_attention), *_adapters(layer.mlp)):
        adapters.layer_number = layer_number


def _set_dropout_keys(module: nn.Module, keys: Optional[DropoutKeys]) -> None:
    for adapters in _adapters(module):
        adapters.dropout_keys = keys


def decoder_block_spec(
    config: DecoderConfig, backend_name: str, groups: Groups, vp_stage: Optional[int]
) -> TransformerBlockSubmodules:
    """The layers of this pipeline chunk and the final norm."""
    norm = backend_by_name(backend_name).layer_norm(rms_norm=True)
    num_layers = get_num_layers_to_build(config, vp_stage, groups.pp_rank)
    layer = decoder_layer_spec(config, backend_name, groups.collection.tp)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def decoder_layer_spec(config: DecoderConfig, backend_name: str, tp_group: Any) -> ModuleSpec:
    """The layer in megatron's spec language, from the backend's modules."""
    backend = backend_by_name(backend_name)

    def first_linear(name: str, norm_name: str) -> tuple[type, type, dict[str, str]]:
        """The norm, the linear behind it and under which names the norm is saved: those of a linear that has
        the norm within it, so that there is one checkpoint for all backends."""
        if backend.fuse_layernorm_and_linear() and not adapted_targets(config.lora, name):
            return IdentityOp, backend.column_parallel_layer_norm_linear(), {}
        # adapters take what the norm gives, which a fused linear keeps to itself
        linear = adapted(backend.column_parallel_linear(), name)
        block = "self_attention" if name == "linear_qkv" else "mlp"
        return backend.layer_norm(rms_norm=True), linear, {f"{norm_name}.": f"{block}.{name}.layer_norm_"}

    def adapted(linear: type, name: str) -> type:
        return with_adapters(linear, name) if adapted_targets(config.lora, name) else linear

    input_norm, qkv, input_norm_names = first_linear("linear_qkv", "input_layernorm")
    mlp_norm, fc1, mlp_norm_names = first_linear("linear_fc1", "pre_mlp_layernorm")
    fc2 = adapted(backend.row_parallel_linear(), "linear_fc2")
    mlp = MLPSubmodules(linear_fc1=fc1, activation_func=swiglu, linear_fc2=fc2)
    attention = ModuleSpec(
        module=BiasedSelfAttention if config.attention_out_bias else RotarySelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv,
            core_attention=backend.core_attention(),
            linear_proj=adapted(backend.row_parallel_linear(), "linear_proj"),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=DecoderLayer,
        params={"backend_name": backend_name},
        submodules=TransformerLayerSubmodules(
            input_layernorm=input_norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=mlp_norm,
            mlp=DecoderMLP.of(mlp, tp_group),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={**input_norm_names, **mlp_norm_names},
        ),
    )


class Decoder(GPTModel):
    """Decoder-only transformer over embeddings that may already contain image features.

    Args:
        language: sizes of the language model.
        config: megatron's configuration of it.
        groups: process groups.
        backend_name: "local" or "te".
        pre_process, post_process: whether this pipeline chunk holds the embedding, the output layer.
        vp_stage: index of the chunk under the interleaved schedule.
    """

    cache: Optional[DecodingCache] = None  # while answers are generated

    def __init__(
        self,
        language: LanguageConfig,
        config: DecoderConfig,
        groups: Groups,
        backend_name: str,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=decoder_block_spec(config, backend_name, groups, vp_stage),
            vocab_size=padded_vocab_size(language.vocab_size, groups.tp_size),
            max_sequence_length=language.max_positions,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=language.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=language.rope_theta,
            # image features are merged into the whole sequence before it is scattered
            scatter_embedding_sequence_parallel=False,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        if post_process and backend_name == "local":
            self.output_layer.__class__ = ColumnLinear  # GPTModel takes no other class for it
        self._fp8 = config.fp8
        self.valid_vocab_size = language.vocab_size
        self.packs_thd = backend_name == "te"
        if post_process and config.sequence_parallel:
            # The hidden states are gathered before positions are chosen, and the gather sums gradients.
            self.output_layer.sequence_parallel = False
            self.output_layer.disable_grad_reduce = True

    @contextmanager
    def caching(self, cache: DecodingCache) -> Iterator[None]:
        """A pass that fills the cache and attends to what is in it. Logits are those behind the last position
        of each row alone."""
        for attention in (self, *self._attentions()):
            attention.cache = cache
        try:
            yield
        finally:
            for attention in (self, *self._attentions()):
                attention.cache = None
        cache.advance()

    def _attentions(self) -> Iterator[Any]:
        for layer in self.decoder.layers:
            yield layer.self_attention
            if layer.gated_cross_attention is not None:
                yield layer.gated_cross_attention.attention

    def decode_next(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """One further token of each row, within `caching`: [1, B, H] embeddings, or what the stage before has
        sent, to [B, 1, V / tp] logits, on earlier stages to [1, B, H]."""
        cache = self.cache
        assert cache is not None and not self.packs_thd
        table, mask = self._cached_table(cache), cache.mask
        for layer in self.decoder.layers:
            hidden_states = layer.decode_next(hidden_states, table, mask)
        if not self.post_process:
            return hidden_states
        is_tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_tied else None
        logits, _ = self.output_layer(self.decoder.final_layernorm(hidden_states), weight=weight)
        return logits.transpose(0, 1)

    def train(self, mode: bool = True) -> Decoder:
        """Training or evaluation; the latter in bf16: sequences of any length do not fit FP8's kernels, and
        the scales that training will use must not depend on what was looked at in between."""
        self.config.fp8 = self._fp8 if mode else None
        return super().train(mode)

    def begin(self, batch: Batch) -> None:
        """Tell the layers which inputs of adapters the next micro-batch leaves out."""
        if not (self.training and self.config.lora.rank and self.config.lora.dropout):
            return
        keys = context_slice(position_keys(batch, self.config.dropout_seed), 1, self.pg_collection.cp)
        whole = keys.t().contiguous()
        for layer in self.decoder.layers:
            layer.dropout_keys = DropoutKeys(whole, self.scatter(whole))

    def embed(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of the whole sequence: [B, S] ids to [S, B, H]."""
        return self.embedding(input_ids=input_ids, position_ids=position_ids)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of a [S, ...] tensor under sequence parallelism; all of it otherwise."""
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(x, group=self.pg_collection.tp)
        return x

    def _preprocess(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """megatron's, with a table of cosines and sines instead of angles, computed once for all layers; its
        positions start again at each document of a packed row."""
        decoder_input, angles, *rest = super()._preprocess(*args, **kwargs)
        if self.cache is not None:
            return decoder_input, self._cached_table(self.cache), *rest
        if kwargs.get("packed_seq_params") is not None:
            angles = angles[kwargs["position_ids"][0]]
        return decoder_input, rope_table(angles[:, 0, 0].chunk(2, dim=-1)[0]), *rest

    def _cached_table(self, cache: DecodingCache) -> torch.Tensor:
        if cache.table is None:
            angles = self.rotary_pos_emb(cache.capacity)
            cache.table = rope_table(angles[:, 0, 0].chunk(2, dim=-1)[0])
        return cache.table

    def _postprocess(
        self, hidden_states: torch.Tensor, labels: Optional[torch.Tensor] = None, **kwargs: Any
    ) -> torch.Tensor:
        """Hidden states [S, B, H] on earlier stages; logits [B, S, V / tp] without labels; else the loss of
        each position, [B, S]."""
        if self.post_process and self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.pg_collection.tp)
        if self.post_process and self.cache is not None and self.cache.is_prompt:
            rows = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            hidden_states = hidden_states[self.cache.lengths - 1, rows][None]
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states=hidden_states, labels=None, **kwargs)
        return self._losses(hidden_states, labels)

    def _losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross entropy of the positions that have a label, 0 elsewhere: [S, B, H] and [B, S] to [B, S].

        Only those positions go through the output layer, whose logits exist a chunk at a time. (In
        instruction tuning most have no label, and the output layer is the widest of the model.)
        """
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        losses = linear_cross_entropy(
            hidden_states,
            weight,
            labels.t(),
            self.valid_vocab_size,
            IGNORE_INDEX,
            self.pg_collection.tp,
            # the gather of the hidden states sums their gradients
            sum_hidden_gradient=not self.config.sequence_parallel,
        )
        return losses.t()
