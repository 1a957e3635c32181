"""InfiMM's Hugging Face layout: an EVA encoder, a perceiver resampler, and LLaMA or Mistral with gated blocks
(Liu et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch

from megamm.config import ModelConfig, Part, VisionConfig
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields, image_token_id
from megamm.convert.remote_code import auto_map, write_image_processor, write_remote_code
from megamm.convert.rules import Table
from megamm.convert.tables import eva, flamingo, llama
from megamm.convert.tables.openclip import ratio
from megamm.errors import InputError

ARCHITECTURE = "InfiMMForConditionalGeneration"
PARTS: tuple[Part, ...] = ("vision", "connector", "language", "cross_attention")
# The features taken: of the last block, class token included, without the norm behind it.
_FEATURES = {"feature_layer": -1, "feature_select": "all", "feature_norm": False}
VISUAL_DEFAULTS = {
    "image_size": 224,
    "patch_size": 14,
    "mlp_ratio": 4.0,
    "naiveswiglu": False,
    "subln": False,
    "postnorm": False,
    "rope": False,
    "intp_freq": False,
    "pt_hw_seq_len": 16,
    "qkv_bias": True,
    "global_average_pool": False,
}


def table(model: ModelConfig, padded_vocab: int | None = None) -> Table:
    """The complete mapping of an InfiMM model.

    Raises:
        InputError: the model is no InfiMM model.
    """
    check_family(model)
    rules = [
        *eva.rules(model.vision, "model.vision_encoder."),
        *flamingo.resampler_rules(model, "model.perceiver."),
        *flamingo.decoder_rules(model, "model.lang_encoder.", padded_vocab),
        *flamingo.gated_block_rules(model, "model.lang_encoder.model.layers."),
    ]
    skips = [*eva.skips("model.vision_encoder."), *flamingo.skips(model, r"model\.lang_encoder\.")]
    return Table(rules, skips)


def check_family(model: ModelConfig) -> None:
    """Raises InputError unless InfiMM's format can express the model."""
    flamingo.check(model, "InfiMM", _FEATURES, skip_text_only=True)
    vision = model.vision
    is_known = vision.norm_eps == 1e-6 and vision.post_norm
    if not is_known or (vision.rotary_side is not None and not vision.sub_norm):
        raise InputError(
            "model.vision: InfiMM's encoders are whole EVA-CLIP encoders, with norm_eps 1e-6 and post_norm"
            " true; this one is another"
        )


def to_hf(
    model: ModelConfig, token_ids: dict[str, int | None], image_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of a model."""
    check_family(model)
    name = str(dtype).removeprefix("torch.")
    return {
        "model_type": "infimm",
        "architectures": [ARCHITECTURE],
        "auto_map": auto_map("infimm", "InfiMMConfig", ARCHITECTURE),
        "dtype": name,
        "torch_dtype": name,
        "visual": visual_to_hf(model.vision),
        "language": llama.to_hf(model.language, token_ids),
        **flamingo.geometry_to_hf(model),
        "image_token_id": image_id,
        "tie_word_embeddings": model.language.tie_embeddings,
        **token_ids,
    }


def from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that an InfiMM config.json describes.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's models can express.
    """
    fields = Fields(config, {}, where)
    connector, blocks = flamingo.geometry_from_hf(fields, skip_text_only=True)
    model = ModelConfig(
        assembly="cross_attention",
        language=llama.from_hf(fields.get("language"), f"{where}, language"),
        vision=vision_from_hf(Fields(fields.get("visual"), VISUAL_DEFAULTS, f"{where}, visual")),
        connector=connector,
        cross_attention=blocks,
    )
    check_family(model)
    return model


def visual_to_hf(vision: VisionConfig) -> dict[str, Any]:
    """An encoder in the words of EVA-CLIP's model configurations."""
    visual: dict[str, Any] = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "width": vision.width,
        "layers": vision.num_layers,
        "head_width": vision.head_dim,
        "mlp_ratio": ratio(vision.mlp_width, vision.width),
        "naiveswiglu": vision.activation == "swiglu",
        "subln": vision.sub_norm,
        "postnorm": vision.residual == "post_norm",
        "rope": vision.rotary_side is not None,
    }
    if vision.rotary_side is not None:
        visual |= {"pt_hw_seq_len": vision.rotary_side, "intp_freq": True}
    return visual


def vision_from_hf(visual: Fields) -> VisionConfig:
    """The encoder that EVA-CLIP's model configuration describes, with all features of its last block."""
    width, head_width = visual.integer("width"), visual.integer("head_width")
    swiglu, rope = visual.flag("naiveswiglu"), visual.flag("rope")
    visual.only("qkv_bias", True)
    visual.only("global_average_pool", False)
    visual.only("ls_init_value", None)
    if rope:
        visual.only("intp_freq", True)
    if width % head_width:
        raise InputError(
            f"{visual.where}: width {width} is no multiple of head_width {head_width}; correct config.json"
        )
    return VisionConfig(
        image_size=visual.integer("image_size"),
        patch_size=visual.integer("patch_size"),
        width=width,
        num_layers=visual.integer("layers"),
        num_heads=width // head_width,
        mlp_width=int(width * visual.number("mlp_ratio")),
        activation="swiglu" if swiglu else "gelu",
        norm_eps=1e-6,
        patch_bias=True,
        qkv_bias="qv",
        sub_norm=visual.flag("subln"),
        residual="post_norm" if visual.flag("postnorm") else "pre_norm",
        rotary_side=visual.integer("pt_hw_seq_len") if rope else None,
        pre_norm=False,
        feature_layer=-1,
        feature_select="all",
    )


def _recognises(found: Found) -> bool:
    # infimm-zephyr, infimm-vicuna, ... : one for each release
    return str(found.config.get("model_type", "")).startswith("infimm")


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    model = from_hf(found.config, found.where)
    return Reading(PARTS, model, table(model), image_token_id(found.config, found.where))


def _config(target: Target) -> dict[str, Any]:
    return to_hf(target.model, target.token_ids, target.need_image_id(), target.dtype)


_WHAT = (
    """InfiMM: an EVA-CLIP encoder, a perceiver resampler, and gated cross-attention blocks in a decoder."""
)
_USAGE = """# pixel_values: [images, 3, height, width], in the order of the <image> tokens in input_ids
logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
ids = model.generate(input_ids=input_ids, pixel_values=pixel_values, max_new_tokens=64)"""


def _extras(target: Target) -> None:
    write_remote_code(target, "infimm", _WHAT, _USAGE)
    write_image_processor(target)


FAMILY = Family("infimm", _recognises, _read, Export(PARTS, table, _config, _extras))
