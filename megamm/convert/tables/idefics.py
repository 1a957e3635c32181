"""IDEFICS as transformers names it (IdeficsForVisionText2Text): CLIP, a perceiver resampler, LLaMA and gated
cross-attention blocks in a list of their own (Laurençon et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megamm.config import ConnectorConfig, CrossAttentionConfig, LanguageConfig, ModelConfig, Part
from megamm.convert.family import Export, Family, Found, Reading, Target, model_type
from megamm.convert.fields import Fields, image_token_id
from megamm.convert.remote_code import write_image_processor
from megamm.convert.rules import (
    GateUp,
    KeysValues,
    Rename,
    Reshape,
    Rule,
    Skip,
    StackedRows,
    Table,
    repeat,
)
from megamm.convert.tables import clip, llama
from megamm.errors import InputError

ARCHITECTURE = "IdeficsForVisionText2Text"
# What a config.json leaves out has the default of its class.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "additional_vocab_size": 0,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "alpha_type": "float",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "cross_layer_interval": 1,
    "qk_layer_norms": False,
    "use_resampler": False,
    "max_position_embeddings": 2048,
}
VISION_DEFAULTS: dict[str, Any] = {
    "embed_dim": 768,
    "image_size": 224,
    "intermediate_size": 5120,
    "patch_size": 14,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
PERCEIVER_DEFAULTS: dict[str, Any] = {
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
    "resampler_head_dim": 96,
    "qk_layer_norms_perceiver": False,
}
_GATES = {"float": "float", "vector": "vector"}


def table(model: ModelConfig, padded_vocab: int | None = None) -> Table:
    """The complete mapping of an IDEFICS model.

    Raises:
        InputError: the model is no IDEFICS model.
    """
    check_family(model)
    rules = [
        *clip.rules(model.vision, "model.vision_model."),
        *_resampler(model, "model.perceiver_resampler."),
        *_vocabulary(model.language, padded_vocab),
        *llama.body_rules(model.language, "model."),
        *_gated_blocks(model, "model.gated_cross_attn_layers."),
    ]
    skips = [*clip.SKIPS, *llama.SKIPS]
    if model.language.tie_embeddings:
        shared = "the output layer shares the weights of the embedding"
        skips.append(Skip(r"lm_head(\.additional_fc)?\.weight", shared))
    return Table(rules, skips)


def _vocabulary(language: LanguageConfig, padded_vocab: int | None) -> list[Rule]:
    """Embedding and output layer, each in two pieces where tokens were added."""
    added = language.added_vocab
    rows = (language.vocab_size - added, added) if added else (language.vocab_size,)
    rest = (language.hidden_size,)

    def pieces(plain: str, extra: str) -> tuple[str, ...]:
        return (plain, extra)[: len(rows)]

    embedding = pieces("model.embed_tokens.weight", "model.embed_tokens.additional_embedding.weight")
    found: list[Rule] = [StackedRows(llama.EMBEDDING, embedding, rows, rest, padded_vocab)]
    if not language.tie_embeddings:
        output = pieces("lm_head.weight", "lm_head.additional_fc.weight")
        found.append(StackedRows(llama.OUTPUT, output, rows, rest, padded_vocab))
    return found


def _norm(ours: str, theirs: str, width: int) -> list[Rule]:
    return [Rename(f"{ours}.{kind}", f"{theirs}.{kind}", (width,)) for kind in ("weight", "bias")]


def _resampler(model: ModelConfig, prefix: str) -> list[Rule]:
    connector, width = model.connector, model.vision.width
    inner, ffn = connector.num_heads * connector.head_dim, connector.ffn_multiple * width
    ours, theirs = "connector.layers.{n}.", f"{prefix}blocks.{{n}}."
    attention = f"{ours}attention."
    layer: list[Rule] = [
        *_norm(f"{ours}norm_media", f"{theirs}0.context_layer_norm", width),
        *_norm(f"{ours}norm_latents", f"{theirs}0.latents_layer_norm", width),
        Rename(f"{attention}to_q.weight", f"{theirs}0.q_proj.weight", (inner, width)),
        KeysValues(
            f"{attention}to_kv.weight",
            (f"{theirs}0.k_proj.weight", f"{theirs}0.v_proj.weight"),
            connector.num_heads,
            connector.head_dim,
            (width,),
        ),
        Rename(f"{attention}to_out.weight", f"{theirs}0.output_proj.weight", (width, inner)),
        *_norm(f"{ours}feed_forward_norm", f"{theirs}1.ln", width),
        Rename(f"{ours}feed_forward.linear_1.weight", f"{theirs}1.fc.weight", (ffn, width)),
        Rename(f"{ours}feed_forward.linear_2.weight", f"{theirs}1.c_proj.weight", (width, ffn)),
    ]
    if connector.qk_norm:
        for part in "qk":
            head_norm = _norm(
                f"{attention}{part}_layernorm", f"{theirs}0.{part}_layer_norm", connector.head_dim
            )
            layer += head_norm
    return [
        Rename("connector.latents", f"{prefix}latents", (connector.num_latents, width)),
        *repeat(connector.depth, layer),
        *_norm("connector.norm", f"{prefix}layer_norm", width),
    ]


def _gated_blocks(model: ModelConfig, prefix: str) -> list[Rule]:
    """The block of decoder layer i is theirs number i / interval."""
    every = model.cross_attention.every
    found: list[Rule] = []
    for layer in range(0, model.language.num_layers, every):
        ours = f"language.decoder.layers.{layer}.gated_cross_attention."
        found += _gated_block(model, ours, f"{prefix}{layer // every}.")
    return found


def _gated_block(model: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    language, blocks = model.language, model.cross_attention
    width, ffn, heads, head_dim = (
        language.hidden_size,
        language.ffn_hidden_size,
        language.num_heads,
        language.head_dim,
    )
    gates, gate_shape = ((width,), (1, 1, width)) if blocks.vector_gates else ((1,), (1,))
    attention, mlp = f"{ours}attention.", f"{ours}feed_forward."
    found: list[Rule] = [
        Reshape(f"{ours}attention_gate", f"{theirs}alpha_cross_attn", gates, gate_shape),
        Reshape(f"{ours}feed_forward_gate", f"{theirs}alpha_dense", gates, gate_shape),
        Rename(f"{ours}attention_norm.weight", f"{theirs}input_layernorm.weight", (width,)),
        Rename(f"{attention}to_q.weight", f"{theirs}cross_attn.q_proj.weight", (width, width)),
        KeysValues(
            f"{attention}to_kv.weight",
            (f"{theirs}cross_attn.k_proj.weight", f"{theirs}cross_attn.v_proj.weight"),
            heads,
            head_dim,
            (model.vision.width,),
        ),
        Rename(f"{attention}to_out.weight", f"{theirs}cross_attn.o_proj.weight", (width, width)),
        Rename(f"{ours}feed_forward_norm.weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        GateUp(
            f"{mlp}linear_fc1.weight",
            f"{theirs}mlp.gate_proj.weight",
            f"{theirs}mlp.up_proj.weight",
            (ffn, width),
        ),
        Rename(f"{mlp}linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, ffn)),
    ]
    if blocks.qk_norm:
        for part in "qk":
            name = f"{theirs}cross_attn.{part}_layer_norm.weight"
            found.append(Rename(f"{attention}{part}_layernorm.weight", name, (head_dim,)))
    return found


def check_family(model: ModelConfig) -> None:
    """Raises InputError unless IdeficsForVisionText2Text can express the model."""
    language, connector, vision = model.language, model.connector, model.vision
    if model.assembly != "cross_attention" or model.cross_attention.geometry != "idefics":
        raise InputError(
            "model: only a cross_attention model with model.cross_attention.geometry idefics is an IDEFICS"
            " model; choose another --family"
        )
    every = model.cross_attention.every
    kv_heads = language.num_kv_heads or language.num_heads
    for is_other, key, value, wanted in (
        (kv_heads != language.num_heads, "language.num_kv_heads", kv_heads, str(language.num_heads)),
        (language.qkv_bias, "language.qkv_bias", True, "false"),
        (language.out_bias, "language.out_bias", True, "false"),
        (
            language.sliding_window is not None,
            "language.sliding_window",
            language.sliding_window,
            "null",
        ),
        (connector.activation != "relu", "connector.activation", connector.activation, "relu"),
        (connector.ffn_multiple != 4, "connector.ffn_multiple", connector.ffn_multiple, "4"),
        (
            vision.feature_layer not in (-1, vision.num_layers),
            "vision.feature_layer",
            vision.feature_layer,
            "-1",
        ),
        (vision.feature_select != "all", "vision.feature_select", vision.feature_select, "all"),
        (vision.feature_norm, "vision.feature_norm", True, "false"),
        (
            language.num_layers % every != 0,
            "cross_attention.every",
            every,
            f"a divisor of the {language.num_layers} layers",
        ),
    ):
        if is_other:
            raise InputError(
                f"model.{key}: is {value}, but an IDEFICS model has {wanted}; this model cannot be exported"
                " to its format"
            )


def to_hf(
    model: ModelConfig, token_ids: Mapping[str, int | None], image_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The IdeficsConfig of a model.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id.
        image_id: id of the image placeholder; transformers has no use for it, megamm's import has.
        dtype: of the weights.
    """
    check_family(model)
    name = str(dtype).removeprefix("torch.")
    language, connector = model.language, model.connector
    plain = llama.to_hf(language, dict(token_ids))
    for key in (
        "model_type",
        "architectures",
        "num_key_value_heads",
        "head_dim",
        "attention_bias",
        "mlp_bias",
    ):
        del plain[key]
    vision = clip.to_hf(model.vision)
    for key in ("model_type", "architectures", "hidden_size"):
        del vision[key]
    return {
        **plain,
        "model_type": "idefics",
        "architectures": [ARCHITECTURE],
        "dtype": name,
        "torch_dtype": name,  # where transformers 4 and others look
        "vocab_size": language.vocab_size - language.added_vocab,
        "additional_vocab_size": language.added_vocab,
        "alpha_type": "vector" if model.cross_attention.vector_gates else "float",
        "cross_layer_interval": model.cross_attention.every,
        "qk_layer_norms": model.cross_attention.qk_norm,
        "use_resampler": True,
        "image_token_id": image_id,
        "vision_config": {**vision, "model_type": "idefics_vision", "embed_dim": model.vision.width},
        "perceiver_config": {
            "model_type": "idefics_perciever",  # sic
            "use_resampler": True,
            "resampler_n_latents": connector.num_latents,
            "resampler_depth": connector.depth,
            "resampler_n_heads": connector.num_heads,
            "resampler_head_dim": connector.head_dim,
            "qk_layer_norms_perceiver": connector.qk_norm,
        },
    }


def from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that an IdeficsConfig describes (as written by transformers 4 or 5).

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's models can express.
    """
    fields = Fields(config, DEFAULTS, where)
    fields.only("model_type", "idefics")
    fields.only("use_resampler", True)
    added = fields.get("additional_vocab_size")
    added = 0 if added == 0 else fields.integer("additional_vocab_size")
    known = {key: fields.get(key) for key in DEFAULTS if key in llama.DEFAULTS["llama"]}
    rotary = {key: fields.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta")}
    vocab_size = fields.integer("vocab_size") + added
    language = llama.from_hf({**known, **rotary, "model_type": "llama", "vocab_size": vocab_size}, where)
    language.added_vocab = added
    eyes = Fields(_section(fields, "vision_config"), VISION_DEFAULTS, f"{where}, vision_config")
    values = {key: eyes.get(key) for key in VISION_DEFAULTS}
    # embed_dim is also written under the name that the other classes have
    values["hidden_size"] = eyes.get("hidden_size") or eyes.get("embed_dim")
    vision = clip.from_hf({**values, "model_type": "clip_vision_model"}, eyes.where)
    vision.feature_layer, vision.feature_select = -1, "all"
    model = ModelConfig(
        assembly="cross_attention",
        language=language,
        vision=vision,
        connector=_connector(fields),
        cross_attention=CrossAttentionConfig(
            geometry="idefics",
            every=fields.integer("cross_layer_interval"),
            qk_norm=fields.flag("qk_layer_norms"),
            vector_gates=fields.one_of("alpha_type", _GATES) == "vector",
        ),
    )
    check_family(model)
    return model


def _connector(fields: Fields) -> ConnectorConfig:
    resampler = Fields(
        _section(fields, "perceiver_config"), PERCEIVER_DEFAULTS, f"{fields.where}, perceiver_config"
    )
    return ConnectorConfig(
        kind="resampler",
        num_latents=resampler.integer("resampler_n_latents"),
        depth=resampler.integer("resampler_depth"),
        num_heads=resampler.integer("resampler_n_heads"),
        head_dim=resampler.integer("resampler_head_dim"),
        activation="relu",
        qk_norm=resampler.flag("qk_layer_norms_perceiver"),
    )


def _section(fields: Fields, name: str) -> Any:
    return {} if fields.get(name) is None else fields.get(name)


PARTS: tuple[Part, ...] = ("vision", "connector", "language", "cross_attention")


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    model = from_hf(found.config, found.where)
    return Reading(PARTS, model, table(model), image_token_id(found.config, found.where))


def _config(target: Target) -> dict[str, Any]:
    return to_hf(target.model, target.token_ids, target.image_id, target.dtype)


FAMILY = Family("idefics", model_type("idefics"), _read, Export(PARTS, table, _config, write_image_processor))
