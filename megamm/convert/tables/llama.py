"""The decoder of LLaMA and Mistral as transformers names it (LlamaForCausalLM, MistralForCausalLM)."""

from __future__ import annotations

import re
from typing import Any

from megamm.config import LanguageConfig, ModelConfig
from megamm.convert.family import Export, Family, Found, Reading, Target, model_type
from megamm.convert.fields import Fields
from megamm.convert.rules import GateUp, InterleaveQKV, PadRows, Rename, Rule, Skip, Table, repeat
from megamm.errors import InputError

# What a config.json leaves out has the default of its class, so these are part of the file format.
_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_COMMON,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
}
SKIPS = [
    Skip(r".*\.rotary_emb\.inv_freq", "a buffer of old releases, computed from rope_theta"),
]
EMBEDDING, OUTPUT = "language.embedding.word_embeddings.weight", "language.output_layer.weight"


def table(config: LanguageConfig, padded_vocab: int | None = None) -> Table:
    """The complete mapping of a language model alone (LlamaForCausalLM, MistralForCausalLM)."""
    return Table(rules(config, "", padded_vocab), skips(config))


def skips(config: LanguageConfig, prefix: str = "") -> list[Skip]:
    """What a decoder's keys may hold beyond the rules."""
    if not config.tie_embeddings:
        return SKIPS
    shared = Skip(
        rf"{re.escape(prefix)}lm_head\.weight", "the output layer shares the weights of the embedding"
    )
    return [*SKIPS, shared]


def rules(config: LanguageConfig, prefix: str = "", padded_vocab: int | None = None) -> list[Rule]:
    """Rules for keys that start with `prefix` ("language_model." in LLaVA).

    `padded_vocab`: rows of our embedding and output layer; None means no padding.
    """
    vocab = (config.vocab_size, config.hidden_size)
    found: list[Rule] = [PadRows(EMBEDDING, f"{prefix}model.embed_tokens.weight", vocab, padded_vocab)]
    found += body_rules(config, f"{prefix}model.")
    if not config.tie_embeddings:
        found.append(PadRows(OUTPUT, f"{prefix}lm_head.weight", vocab, padded_vocab))
    return found


def body_rules(config: LanguageConfig, prefix: str, layer: str = "layers.{n}.") -> list[Rule]:
    """The layers, under `prefix` and `layer`, and the final norm: all but what depends on the vocabulary."""
    norm = Rename("language.decoder.final_layernorm.weight", f"{prefix}norm.weight", (config.hidden_size,))
    return [*repeat(config.num_layers, _layer(config, f"{prefix}{layer}")), norm]


def _layer(config: LanguageConfig, theirs: str) -> list[Rule]:
    ours = "language.decoder.layers.{n}."
    width = config.hidden_size
    ffn = config.ffn_hidden_size
    qkv, mlp = f"{ours}self_attention.linear_qkv.", f"{ours}mlp."
    attention = f"{theirs}self_attn."
    heads = (config.num_heads, config.num_kv_heads or config.num_heads, config.head_dim)

    def packed(kind: str, rest: tuple[int, ...]) -> Rule:
        names = [f"{attention}{part}_proj.{kind}" for part in "qkv"]
        return InterleaveQKV(f"{qkv}{kind}", names[0], names[1], names[2], *heads, rest)

    rules = [
        Rename(f"{qkv}layer_norm_weight", f"{theirs}input_layernorm.weight", (width,)),
        packed("weight", (width,)),
        Rename(f"{ours}self_attention.linear_proj.weight", f"{attention}o_proj.weight", (width, width)),
        Rename(f"{mlp}linear_fc1.layer_norm_weight", f"{theirs}post_attention_layernorm.weight", (width,)),
        GateUp(
            f"{mlp}linear_fc1.weight",
            f"{theirs}mlp.gate_proj.weight",
            f"{theirs}mlp.up_proj.weight",
            (ffn, width),
        ),
        Rename(f"{mlp}linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (width, ffn)),
    ]
    if config.qkv_bias:
        rules.append(packed("bias", ()))
    if config.out_bias:
        rules.append(Rename(f"{ours}self_attention.linear_proj.bias", f"{attention}o_proj.bias", (width,)))
    return rules


def check(config: LanguageConfig) -> None:
    """Raises InputError unless LlamaConfig or MistralConfig can express the decoder."""
    mistral = config.sliding_window is not None
    if config.qkv_bias != config.out_bias or (mistral and config.qkv_bias):
        raise InputError(
            "model.language: LlamaConfig has biases on all four attention projections or on none, and none"
            " with a sliding window; this decoder cannot be exported to it"
        )


def to_hf(config: LanguageConfig, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The LlamaConfig (MistralConfig with a sliding window) of a decoder.

    Raises:
        InputError: the decoder has something neither class can express.
    """
    check(config)
    mistral = config.sliding_window is not None
    found: dict[str, Any] = {
        "model_type": "mistral" if mistral else "llama",
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,  # where transformers 4 and others look
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids,
    }
    if mistral:
        found["sliding_window"] = config.sliding_window
    else:
        found |= {"attention_bias": config.qkv_bias, "mlp_bias": False}
    return found


def from_hf(values: Any, where: str) -> LanguageConfig:
    """The decoder that a LlamaConfig or MistralConfig describes (as written by transformers 4 or 5).

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's decoder can express.
    """
    fields = Fields(values, {}, where)
    kind = fields.one_of("model_type", {name: name for name in DEFAULTS})
    # null is a value of its own where it means "none" and is not the default
    nulls = {key for key in ("sliding_window", "num_key_value_heads") if values.get(key, 0) is None}
    defaults = {key: value for key, value in DEFAULTS[kind].items() if key not in nulls}
    fields = Fields(values, defaults, where)
    fields.only("hidden_act", "silu")
    fields.only("mlp_bias", False)
    heads, width = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    kv_heads = fields.integer("num_key_value_heads") if fields.get("num_key_value_heads") else heads
    if width % heads or heads % kv_heads:
        raise InputError(
            f"{where}: hidden_size {width}, num_attention_heads {heads} and num_key_value_heads {kv_heads}"
            " must divide one another; correct config.json"
        )
    fields.only("head_dim", None, width // heads)
    bias = fields.flag("attention_bias") if kind == "llama" else False
    window = fields.integer("sliding_window") if kind == "mistral" and fields.get("sliding_window") else None
    return LanguageConfig(
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=_rope_theta(fields),
        qkv_bias=bias,
        out_bias=bias,
        sliding_window=window,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        init_std=fields.number("initializer_range"),
    )


def _rope_theta(fields: Fields) -> float:
    """The base of the rotary embedding; scaled variants are refused (megamm does not compute them)."""
    for key in ("rope_scaling", "rope_parameters"):
        value = fields.get(key)
        if value is None:
            continue
        section = Fields(value, {"rope_theta": fields.get("rope_theta")}, f"{fields.where}, {key}")
        # "type" is what transformers 4 called it first.
        for name in ("rope_type", "type"):
            section.only(name, None, "default")
        if key == "rope_parameters":
            return section.number("rope_theta")
    return fields.number("rope_theta")


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    language = from_hf(found.config, found.where)
    return Reading(("language",), ModelConfig(language=language), table(language))


def _config(target: Target) -> dict[str, Any]:
    name = str(target.dtype).removeprefix("torch.")
    return {**to_hf(target.model.language, target.token_ids), "dtype": name, "torch_dtype": name}


def _export_table(model: ModelConfig) -> Table:
    check(model.language)
    return table(model.language)


FAMILY = Family("llama", model_type("llama", "mistral"), _read, Export(("language",), _export_table, _config))
