"""InternLM-XComposer's Hugging Face layout (Zhang et al. 2023): an EVA encoder, a Q-Former between two flag
embeddings, InternLM with low-rank adapters."""

from __future__ import annotations

from typing import Any, Literal

import torch

from megamm.config import ConnectorConfig, LanguageConfig, LoraConfig, ModelConfig, Part, VisionConfig
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields, image_token_id
from megamm.convert.remote_code import auto_map, write_image_processor, write_remote_code
from megamm.convert.rules import KeysValues, Reshape, Rule, Skip, Table
from megamm.convert.tables import eva, infimm, llama, peft
from megamm.convert.tables.clip import linear_rules, norm_rules
from megamm.errors import InputError

ARCHITECTURE = "InternLMXComposerForCausalLM"
MODEL_TYPE = "InternLMXComposer"
PARTS: tuple[Part, ...] = ("vision", "connector", "language", "lora")
DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 103168,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "kqvo_bias": True,
    "num_query_token": 32,
}
# What the published code has and its config.json does not say: BLIP-2's encoder and BERT-base.
QFORMER_DEFAULTS: dict[str, Any] = {
    "depth": 12,
    "heads": 12,
    "dim_head": 64,
    "ff_mult": 4,
    "cross_every": 2,
    "flag_embeddings": True,
}
VISUAL_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 14,
    "width": 1408,
    "layers": 39,
    "head_width": 88,
    "mlp_ratio": 4.3637,
    "has_norm": False,
}
# of the public tokenizer, which has no token for images: <TOKENS_UNUSED_2>, which InternLM never uses
_PUBLIC_IMAGE_ID = 103029
_LAYERS = "internlm_model.model.layers.{n}."
_Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
_LEARNED: dict[str, tuple[_Target, ...]] = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("o",),
    "ffn": ("up", "down"),
}


def table(model: ModelConfig, padded_vocab: int | None = None) -> Table:
    """The complete mapping of an InternLM-XComposer model.

    Raises:
        InputError: the model is no InternLM-XComposer model.
    """
    check_family(model)
    rules = [
        *eva.rules(model.vision, "visual_encoder."),
        *_qformer(model),
        *llama.rules(model.language, "internlm_model.", padded_vocab),
        *peft.rules(model, _LAYERS),
    ]
    skips = [
        *eva.skips("visual_encoder."),
        *llama.skips(model.language, "internlm_model."),
        Skip(r"Qformer\.bert\.embeddings\.position_ids", "a buffer, the numbers 0, 1, 2, ..."),
        Skip(
            r"Qformer\.(cls|bert\.embeddings\.(word|position)_embeddings)\..*|"
            r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
            "BERT's path for text, which has no part in the model",
        ),
    ]
    return Table(rules, skips)


def _qformer(model: ModelConfig) -> list[Rule]:
    connector, hidden = model.connector, model.language.hidden_size
    width = connector.num_heads * connector.head_dim
    bert = "Qformer.bert."
    queries = (connector.num_latents, width)
    found: list[Rule] = [
        Reshape("connector.queries", "query_tokens", queries, (1, *queries)),
        *norm_rules("connector.norm_vision", "ln_vision", model.vision.width),
        *norm_rules("connector.norm_queries", f"{bert}embeddings.LayerNorm", width),
    ]
    for layer in range(connector.depth):
        ours, theirs = f"connector.layers.{layer}.", f"{bert}encoder.layer.{layer}."
        found += _attention(connector, f"{ours}self_attention", f"{theirs}attention.", width)
        if layer % connector.cross_every == 0:
            found += _attention(
                connector, f"{ours}cross_attention", f"{theirs}crossattention.", model.vision.width
            )
        ffn = connector.ffn_multiple * width
        linears = f"{ours}feed_forward."
        found += [
            *linear_rules(f"{linears}linear_1", f"{theirs}intermediate_query.dense", ffn, width),
            *linear_rules(f"{linears}linear_2", f"{theirs}output_query.dense", width, ffn),
            *norm_rules(f"{ours}feed_forward_norm", f"{theirs}output_query.LayerNorm", width),
        ]
    found += linear_rules("connector.proj", "internlm_proj", hidden, width)
    if connector.flag_embeddings:
        for side in ("start", "end"):
            name = f"flag_image_{side}"
            found.append(Reshape(f"connector.flag_{side}", name, (hidden,), (1, 1, hidden)))
    return found


def _attention(connector: ConnectorConfig, ours: str, theirs: str, context: int) -> list[Rule]:
    heads, head_dim = connector.num_heads, connector.head_dim
    width = heads * head_dim

    def packed(kind: str, rest: tuple[int, ...]) -> Rule:
        parts = tuple(f"{theirs}self.{part}.{kind}" for part in ("key", "value"))
        return KeysValues(f"{ours}.to_kv.{kind}", parts, heads, head_dim, rest)

    return [
        *linear_rules(f"{ours}.to_q", f"{theirs}self.query", width, width),
        packed("weight", (context,)),
        packed("bias", ()),
        *linear_rules(f"{ours}.to_out", f"{theirs}output.dense", width, width),
        *norm_rules(f"{ours}_norm", f"{theirs}output.LayerNorm", width),
    ]


def check_family(model: ModelConfig) -> None:
    """Raises InputError unless InternLM-XComposer's format can express the model."""
    if model.assembly != "merged" or model.connector.kind != "qformer":
        raise InputError(
            f"model: a {model.assembly} model with a {model.connector.kind} connector is no InternLM-"
            "XComposer model, which is merged with a qformer; choose another --family"
        )
    llama.check(model.language)
    vision = model.vision
    for key, value, wanted in (
        ("language.sliding_window", model.language.sliding_window, None),
        ("vision.norm_eps", vision.norm_eps, 1e-6),
        ("vision.feature_norm", vision.feature_norm, False),
        ("vision.feature_select", vision.feature_select, "all"),
        ("vision.feature_layer", vision.feature_layer % (vision.num_layers + 1), vision.num_layers),
    ):
        if value != wanted:
            raise InputError(
                f"model.{key}: is {value}, but an InternLM-XComposer model has {wanted}; this model cannot be"
                " exported to its format"
            )
    if model.lora.rank and _learned(model.lora) is None:
        raise InputError(
            f"model.lora.targets: are {', '.join(model.lora.targets)}, but InternLM-XComposer's format has"
            " adapters on q, k, v, o, and on up and down together; export with --merge-lora"
        )


def _learned(lora: LoraConfig) -> list[str] | None:
    """The adapters in the words of config.json, or None if it has none for them."""
    names = [name for name, targets in _LEARNED.items() if set(targets) <= set(lora.targets)]
    named = {target for name in names for target in _LEARNED[name]}
    return names if named == set(lora.targets) else None


# --- config.json --------------------------------------------------------------------------------------


def to_hf(
    model: ModelConfig, token_ids: dict[str, int | None], image_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of a model."""
    check_family(model)
    name, language, connector = str(dtype).removeprefix("torch."), model.language, model.connector
    plain = llama.to_hf(language, token_ids)
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias"):
        del plain[key]
    lora = {
        "freeze": False,
        "learn_param": _learned(model.lora),
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        "lora_r": model.lora.rank,
    }
    adapters = lora if model.lora.rank else None
    return {
        **plain,
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": auto_map("xcomposer", "InternLMXComposerConfig", ARCHITECTURE),
        "dtype": name,
        "torch_dtype": name,
        "bias": language.qkv_bias,
        "kqvo_bias": language.qkv_bias,
        "intern_converted_llm": True,
        "internlm_lora": adapters,
        "lora_cfg": adapters,
        "num_query_token": connector.num_latents,
        "qformer": {
            "depth": connector.depth,
            "heads": connector.num_heads,
            "dim_head": connector.head_dim,
            "ff_mult": connector.ffn_multiple,
            "cross_every": connector.cross_every,
            "flag_embeddings": connector.flag_embeddings,
        },
        "visual": {**infimm.visual_to_hf(model.vision), "has_norm": model.vision.post_norm},
        "image_token_id": image_id,
    }


def from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that an InternLM-XComposer config.json describes.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's models can express.
    """
    fields = Fields(config, DEFAULTS, where)
    visual = Fields(
        fields.get("visual") or {}, {**infimm.VISUAL_DEFAULTS, **VISUAL_DEFAULTS}, f"{where}, visual"
    )
    vision: VisionConfig = infimm.vision_from_hf(visual)
    vision.post_norm = visual.flag("has_norm")
    model = ModelConfig(
        assembly="merged",
        language=_language(fields),
        vision=vision,
        connector=_connector(fields),
        lora=_lora(fields),
    )
    check_family(model)
    return model


def _language(fields: Fields) -> LanguageConfig:
    keys = [key for key in DEFAULTS if key not in ("kqvo_bias", "num_query_token")]
    keys += ["num_key_value_heads", "rope_theta", "rope_parameters"]
    values = {key: fields.get(key) for key in keys}
    bias = fields.flag("kqvo_bias")
    return llama.from_hf({**values, "model_type": "llama", "attention_bias": bias}, fields.where)


def _connector(fields: Fields) -> ConnectorConfig:
    qformer = Fields(fields.get("qformer") or {}, QFORMER_DEFAULTS, f"{fields.where}, qformer")
    return ConnectorConfig(
        kind="qformer",
        num_latents=fields.integer("num_query_token"),
        depth=qformer.integer("depth"),
        num_heads=qformer.integer("heads"),
        head_dim=qformer.integer("dim_head"),
        ffn_multiple=qformer.integer("ff_mult"),
        cross_every=qformer.integer("cross_every"),
        flag_embeddings=qformer.flag("flag_embeddings"),
    )


def _lora(fields: Fields) -> LoraConfig:
    values = fields.get("internlm_lora")
    if values is None:
        return LoraConfig()
    lora = Fields(
        values, {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}, f"{fields.where}, internlm_lora"
    )
    learned, dropout = lora.get("learn_param"), lora.get("lora_dropout")
    if not isinstance(learned, list) or not set(learned) <= set(_LEARNED):
        raise InputError(
            f"{lora.where}: learn_param is {learned!r}, but must be a list of {', '.join(_LEARNED)}; correct"
            " config.json"
        )
    return LoraConfig(
        rank=lora.integer("lora_r"),
        alpha=lora.number("lora_alpha"),
        dropout=lora.number("lora_dropout") if dropout else 0.0,
        targets=[target for name in _LEARNED if name in learned for target in _LEARNED[name]],
    )


# --- the family ---------------------------------------------------------------------------------------


def _recognises(found: Found) -> bool:
    return found.config.get("model_type") == MODEL_TYPE


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    model = from_hf(found.config, found.where)
    parts = PARTS if model.lora.rank else PARTS[:-1]
    image_id = image_token_id(found.config, found.where)
    if image_id is None and model.language.vocab_size > _PUBLIC_IMAGE_ID:
        image_id = _PUBLIC_IMAGE_ID
    return Reading(parts, model, table(model), image_id)


def _config(target: Target) -> dict[str, Any]:
    return to_hf(target.model, target.token_ids, target.need_image_id(), target.dtype)


_WHAT = "InternLM-XComposer: an EVA encoder, a Q-Former, and InternLM with low-rank adapters."
_USAGE = """# input_ids: the token of an image stands once for each position that the image takes
logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
ids = model.generate(input_ids=input_ids, pixel_values=pixel_values, max_new_tokens=64)"""


def _extras(target: Target) -> None:
    model = target.model
    note = f"An image takes {model.tokens_per_image} positions of token {target.image_id}."
    write_remote_code(target, "xcomposer", _WHAT, _USAGE, note)
    write_image_processor(target)


FAMILY = Family("xcomposer", _recognises, _read, Export(PARTS, table, _config, _extras))
