"""InternLM-7B under its own name (InternLMForCausalLM): LLaMA with biases on the attention projections.

transformers has no class for it, so an exported directory brings its own. The keys are those of LLaMA: the
same weights are also a LlamaForCausalLM with attention_bias (--family llama).
"""

from __future__ import annotations

from typing import Any

from megamm.config import LanguageConfig, ModelConfig
from megamm.convert.family import Export, Family, Found, Reading, Target, model_type
from megamm.convert.fields import Fields
from megamm.convert.remote_code import auto_map, write_remote_code
from megamm.convert.rules import Table
from megamm.convert.tables import llama
from megamm.errors import InputError

ARCHITECTURE = "InternLMForCausalLM"
# What a config.json leaves out has the default of InternLMConfig.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 103168,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bias": True,
    "rotary": {"base": 10000, "type": "dynamic"},
}
table = llama.table


def from_hf(values: Any, where: str) -> LanguageConfig:
    """The decoder that an InternLMConfig describes.

    Its "dynamic" rotary positions differ from plain ones only beyond max_position_embeddings.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's decoder can express.
    """
    fields = Fields(values, DEFAULTS, where)
    bias = fields.flag("bias")
    rotary = Fields(fields.get("rotary"), DEFAULTS["rotary"], f"{where}, rotary")
    rotary.only("type", "dynamic", "origin")
    known = {key: fields.get(key) for key in DEFAULTS if key not in ("bias", "rotary")}
    heads = fields.get("num_key_value_heads")
    plain = {
        **known,
        "model_type": "llama",
        "num_key_value_heads": heads,
        "attention_bias": bias,
        "rope_theta": rotary.number("base"),
        "rope_scaling": fields.get("rope_scaling"),
    }
    return llama.from_hf(plain, where)


def check(config: LanguageConfig) -> None:
    """Raises InputError unless InternLMConfig can express the decoder."""
    llama.check(config)
    if config.sliding_window is not None or (config.num_kv_heads or config.num_heads) != config.num_heads:
        raise InputError(
            "model.language: InternLM has neither a sliding window nor grouped queries; export this decoder"
            " with --family llama"
        )


def to_hf(config: LanguageConfig, token_ids: dict[str, int | None]) -> dict[str, Any]:
    """The InternLMConfig of a decoder.

    Raises:
        InputError: the decoder has something that the class cannot express.
    """
    check(config)
    return {
        "model_type": "internlm",
        "architectures": [ARCHITECTURE],
        "auto_map": auto_map("internlm", "InternLMConfig", ARCHITECTURE),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "bias": config.qkv_bias,
        "rotary": {"base": config.rope_theta, "type": "origin"},
        "tie_word_embeddings": config.tie_embeddings,
        **token_ids,
    }


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    language = from_hf(found.config, found.where)
    return Reading(("language",), ModelConfig(language=language), table(language))


def _config(target: Target) -> dict[str, Any]:
    name = str(target.dtype).removeprefix("torch.")
    return {**to_hf(target.model.language, target.token_ids), "dtype": name, "torch_dtype": name}


def _export_table(model: ModelConfig) -> Table:
    check(model.language)
    return table(model.language)


def _extras(target: Target) -> None:
    what = "InternLM: LLaMA with biases on the attention projections."
    write_remote_code(target, "internlm", what, "logits = model(input_ids=input_ids).logits")


FAMILY = Family(
    "internlm", model_type("internlm"), _read, Export(("language",), _export_table, _config, _extras)
)
