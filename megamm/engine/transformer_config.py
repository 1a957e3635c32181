"""From a recipe to megatron-core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from megatron.core.transformer import TransformerConfig

from megamm.config import CrossAttentionConfig, LoraConfig, Recipe
from megamm.device import dtype_of


@dataclass
class DecoderConfig(TransformerConfig):
    """TransformerConfig plus what the gated cross-attention layers and the adapters must know.

    Attributes:
        attention_out_bias: whether attention's output projection has a bias (InternLM); megatron knows
            only one switch for the biases of all linears.
        gated_cross_attention: geometry of the blocks, or None for a plain decoder.
        media_width: width of the media tokens they attend to.
        recomputed_layers: of each pipeline chunk, how many layers are recomputed in the backward pass.
        lora: adapters of the decoder's linears.
        dropout_seed: decides what the adapters' dropout leaves out.
    """

    attention_out_bias: bool = False
    gated_cross_attention: Optional[CrossAttentionConfig] = None
    media_width: int = 0
    recomputed_layers: int = 0
    lora: LoraConfig = field(default_factory=LoraConfig)
    dropout_seed: int = 0


def decoder_config(recipe: Recipe) -> DecoderConfig:
    """The configuration of the recipe's language model in its parallel layout."""
    language = recipe.model.language
    dtype = dtype_of(recipe.training.precision)
    cross = recipe.model.cross_attention if recipe.model.assembly == "cross_attention" else None
    return DecoderConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_heads,
        num_query_groups=language.num_kv_heads or language.num_heads,
        ffn_hidden_size=language.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=language.qkv_bias,
        attention_out_bias=language.out_bias,
        window_size=(language.sliding_window - 1, 0) if language.sliding_window else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # The loss of a step is the mean over its tokens, whatever rank or micro-batch they lie in.
        calculate_per_token_loss=True,
        # Weights are drawn by models.initialization from their names, equal for every layout. Switching
        # megatron's own initialisation off would also switch off the marks it puts on sharded weights,
        # without which the gradient norm counts only rank 0's shards.
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        embedding_init_method=_leave_empty,
        # megatron's other way takes CUDA memory by name, also where the default device is "meta" (a dry run)
        use_cpu_initialization=not torch.cuda.is_available() or torch.get_default_device().type == "meta",
        # Every layer has its own keys in a checkpoint: layers differ (cross-attention every n-th).
        hetereogenous_dist_checkpoint=True,
        gated_cross_attention=cross,
        # Has megatron sum the gradients of q_layernorm and k_layernorm, which see only the heads of their
        # rank, over the tensor-parallel ranks. (The decoder's own attention gets no such norms from this.)
        qk_layernorm=recipe.model.connector.qk_norm or (cross is not None and cross.qk_norm),
        media_width=recipe.model.vision.width if cross else 0,
        lora=recipe.model.lora,
        dropout_seed=recipe.seed,
        deterministic_mode=recipe.training.deterministic,
        **_fusions(),
        **_recompute(recipe),
        **_fp8(recipe),
        **_parallel(recipe),
    )


def _leave_empty(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _fusions() -> dict[str, Any]:
    """megatron's need CUDA extensions; megamm has its own of SwiGLU, rotary positions and the loss."""
    return {
        # (the name misleads: the layers bring the whole activation, which need not be Transformer Engine's)
        "use_te_activation_func": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
    }


def _recompute(recipe: Recipe) -> dict[str, Any]:
    """Recomputation of attention is megatron's; that of MLPs and whole layers is layers.decoder's."""
    settings = recipe.training.recompute
    if settings.language == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(settings.modules)}
    if settings.language == "full":
        layers = recipe.model.language.num_layers
        return {"recomputed_layers": layers if settings.layers is None else settings.layers}
    return {}


# megatron-core's names of the scalings
_FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise", "mxfp8": "mxfp8"}


def _fp8(recipe: Recipe) -> dict[str, Any]:
    """The decoder's linears in 8 bits: megatron's TransformerBlock opens Transformer Engine's FP8 context for
    the whole pass ("delayed") or layer by layer. Attention itself stays in bf16."""
    fp8 = recipe.training.fp8
    if fp8.scaling == "off":
        return {}
    return {
        "fp8": fp8.format,
        "fp8_recipe": _FP8_RECIPES[fp8.scaling],
        "fp8_margin": fp8.margin,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": fp8.amax_choice,
        "first_last_layers_bf16": fp8.bf16_layers_at_start + fp8.bf16_layers_at_end > 0,
        "num_layers_at_start_in_bf16": fp8.bf16_layers_at_start,
        "num_layers_at_end_in_bf16": fp8.bf16_layers_at_end,
    }


def _parallel(recipe: Recipe) -> dict[str, Any]:
    parallel = recipe.parallel
    interleaved = (parallel.virtual_pipeline or 1) > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "pipeline_model_parallel_layout": parallel.pipeline_layout,
        "sequence_parallel": parallel.sequence,
        "context_parallel_size": parallel.context,
        "cp_comm_type": "p2p" if parallel.context > 1 else None,  # how Transformer Engine does it
        # With two stages the previous and the next rank are the same process, and megatron's batched
        # p2p swaps forward and backward messages: silently wrong gradients. Overlapped p2p does not.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Freeing a sent tensor is safe only when the send is known to be complete.
        "deallocate_pipeline_outputs": not interleaved,
    }
