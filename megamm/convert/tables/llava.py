"""LLaVA as transformers names it (LlavaForConditionalGeneration): CLIP, a two-layer MLP, LLaMA.

Written is the layout of the public checkpoints, which transformers 4 and 5 load; so does vLLM, whose encoder
has a `vision_model` within it, a name that it does not add to keys. Read are also the keys of transformers 5
in memory, and those that its save_pretrained writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch

from megamm.config import ConnectorConfig, ModelConfig, Part
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields
from megamm.convert.processor import write_processor
from megamm.convert.rules import Rule, Table
from megamm.convert.tables import clip, llama
from megamm.errors import InputError

ARCHITECTURE = "LlavaForConditionalGeneration"
DEFAULTS: dict[str, Any] = {
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
    "image_token_index": 32000,
}
# LlavaConfig fills in the vision tower of the public models where config.json is silent.
VISION_DEFAULTS = {
    "model_type": "clip_vision_model",
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
_STRATEGIES = {"patch": "default", "all": "full"}
_TOWER = "vision_tower.vision_model."
_ALIASES = [
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
    ("lm_head.", "language_model.lm_head."),
    (_TOWER, "vision_tower."),  # or it would be doubled next
    ("vision_tower.", _TOWER),
]


def table(model: ModelConfig, padded_vocab: int | None = None) -> Table:
    """The complete mapping of a LLaVA model.

    Raises:
        InputError: the model is no LLaVA model.
    """
    check_family(model)
    rules = [
        *clip.rules(model.vision, _TOWER),
        *projector_rules(model, "multi_modal_projector."),
        *llama.rules(model.language, "language_model.", padded_vocab),
    ]
    skips = [*clip.SKIPS, *llama.skips(model.language, "language_model.")]
    return Table(rules, skips, _ALIASES)


def projector_rules(
    model: ModelConfig, prefix: str = "", names: tuple[str, str] = ("linear_1", "linear_2")
) -> list[Rule]:
    """The two linear layers of the projector, which the format calls `names`."""
    width, hidden = model.vision.width, model.language.hidden_size
    return [
        *clip.linear_rules("connector.linear_1", f"{prefix}{names[0]}", hidden, width),
        *clip.linear_rules("connector.linear_2", f"{prefix}{names[1]}", hidden, hidden),
    ]


def check_family(model: ModelConfig) -> None:
    """Raises InputError unless LlavaForConditionalGeneration can express the model."""
    if model.assembly != "merged" or model.connector.kind != "mlp":
        raise InputError(
            f"model: a {model.assembly} model with a {model.connector.kind} connector is no LLaVA model;"
            " only merged models with an mlp connector can be exported so far"
        )
    if model.vision.feature_norm:
        raise InputError(
            "model.vision.feature_norm: LLaVA takes features as they leave a block, without a norm"
        )
    llama.check(model.language)


def to_hf(
    model: ModelConfig, token_ids: Mapping[str, int | None], image_id: int, dtype: torch.dtype
) -> dict[str, Any]:
    """The LlavaConfig of a model.

    Args:
        token_ids: bos_token_id, eos_token_id, pad_token_id.
        image_id: id of the image placeholder.
        dtype: of the weights.
    """
    check_family(model)
    name = str(dtype).removeprefix("torch.")
    return {
        "model_type": "llava",
        "architectures": [ARCHITECTURE],
        "dtype": name,
        "torch_dtype": name,  # where transformers 4 and others look
        "text_config": {**llama.to_hf(model.language, dict(token_ids)), "dtype": name},
        "vision_config": {**clip.to_hf(model.vision), "dtype": name},
        "image_token_index": image_id,
        "image_seq_length": model.vision.num_features,
        "vision_feature_layer": model.vision.feature_layer,
        "vision_feature_select_strategy": _STRATEGIES[model.vision.feature_select],
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": model.language.tie_embeddings,
        **token_ids,
    }


def from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that a LlavaConfig describes (as written by transformers 4 or 5).

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's models can express.
    """
    fields = Fields(config, DEFAULTS, where)
    fields.only("projector_hidden_act", "gelu")
    fields.only("multimodal_projector_bias", True)
    strategy = fields.one_of("vision_feature_select_strategy", {hf: our for our, hf in _STRATEGIES.items()})
    vision = clip.from_hf(_filled(fields.get("vision_config"), VISION_DEFAULTS), f"{where}, vision_config")
    layer = fields.get("vision_feature_layer")
    if not isinstance(layer, int) or not -vision.num_layers - 1 <= layer <= vision.num_layers:
        raise InputError(
            f"{where}: vision_feature_layer is {layer!r}, but megamm takes the features of one of the"
            f" {vision.num_layers} layers; choose another model"
        )
    vision.feature_layer = layer
    vision.feature_select = cast(Literal["patch", "all"], strategy)
    language = llama.from_hf(
        _filled(fields.get("text_config"), {"model_type": "llama"}), f"{where}, text_config"
    )
    language.tie_embeddings = language.tie_embeddings or fields.flag("tie_word_embeddings")
    return ModelConfig(
        assembly="merged", language=language, vision=vision, connector=ConnectorConfig(kind="mlp")
    )


def image_token_id(config: dict[str, Any], where: str) -> int:
    """The id of the image placeholder, under the name of either transformers release."""
    fields = Fields(config, DEFAULTS, where)
    return fields.integer(
        "image_token_id" if fields.get("image_token_id") is not None else "image_token_index"
    )


def _filled(values: Any, defaults: dict[str, Any]) -> Any:
    if values is None:
        return dict(defaults)
    return {**defaults, **values} if isinstance(values, dict) else values


PARTS: tuple[Part, ...] = ("vision", "connector", "language")


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    model = from_hf(found.config, found.where)
    return Reading(PARTS, model, table(model), image_token_id(found.config, found.where))


def _config(target: Target) -> dict[str, Any]:
    return to_hf(target.model, target.token_ids, target.need_image_id(), target.dtype)


def is_original(config: dict[str, Any]) -> bool:
    """Whether it is the authors' config.json (`llava_original`), which may have the same model_type."""
    return "mm_vision_tower" in config or "mm_projector_type" in config


def _recognises(found: Found) -> bool:
    return found.config.get("model_type") == "llava" and not is_original(found.config)


FAMILY = Family("llava", _recognises, _read, Export(PARTS, table, _config, write_processor))
