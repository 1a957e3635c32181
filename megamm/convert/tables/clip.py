"""The vision encoder of CLIP as transformers names it (CLIPVisionModel)."""

from __future__ import annotations

from typing import Any, Literal, cast

from megamm.config import VisionConfig
from megamm.convert.fields import Fields
from megamm.convert.rules import Concat, Rename, Rule, Skip, repeat
from megamm.errors import InputError

# What a config.json leaves out has the default of its class (CLIPVisionConfig).
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
}
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu"}
SKIPS = [
    Skip(r".*embeddings\.position_ids", "a buffer of old releases, the numbers 0, 1, 2, ..."),
]

TEXT_TOWER = [
    Skip(r"text_model\..*", "CLIP's text tower, which megamm does not use"),
    Skip(
        r"(text|visual)_projection\.weight|logit_scale", "CLIP's contrastive head, which megamm does not use"
    ),
]


def rules(config: VisionConfig, prefix: str = "") -> list[Rule]:
    """Rules for keys that start with `prefix` ("vision_tower." in LLaVA)."""
    width, patch = config.width, config.patch_size
    found: list[Rule] = [
        Rename("vision.class_embedding", f"{prefix}embeddings.class_embedding", (width,)),
        Rename(
            "vision.patch_embedding.weight",
            f"{prefix}embeddings.patch_embedding.weight",
            (width, 3, patch, patch),
        ),
        Rename(
            "vision.position_embedding",
            f"{prefix}embeddings.position_embedding.weight",
            (1 + config.num_patches, width),
        ),
        *_norm("vision.pre_norm", f"{prefix}pre_layrnorm", width),  # sic
    ]
    found += repeat(config.num_layers, _block(config, f"{prefix}encoder.layers.{{n}}."))
    return [*found, *_norm("vision.post_norm", f"{prefix}post_layernorm", width)]


def _norm(ours: str, theirs: str, width: int) -> list[Rule]:
    return [Rename(f"{ours}.{kind}", f"{theirs}.{kind}", (width,)) for kind in ("weight", "bias")]


def _linear(ours: str, theirs: str, outputs: int, inputs: int) -> list[Rule]:
    return [
        Rename(f"{ours}.weight", f"{theirs}.weight", (outputs, inputs)),
        Rename(f"{ours}.bias", f"{theirs}.bias", (outputs,)),
    ]


def _block(config: VisionConfig, theirs: str) -> list[Rule]:
    ours, width = "vision.blocks.{n}.", config.width
    attention = f"{theirs}self_attn."
    weights = tuple(f"{attention}{part}_proj.weight" for part in "qkv")
    biases = tuple(f"{attention}{part}_proj.bias" for part in "qkv")
    return [
        *_norm(f"{ours}norm1", f"{theirs}layer_norm1", width),
        Concat(f"{ours}attention.qkv.weight", weights, (width, width)),
        Concat(f"{ours}attention.qkv.bias", biases, (width,)),
        *_linear(f"{ours}attention.proj", f"{attention}out_proj", width, width),
        *_norm(f"{ours}norm2", f"{theirs}layer_norm2", width),
        *_linear(f"{ours}mlp.fc1", f"{theirs}mlp.fc1", config.mlp_width, width),
        *_linear(f"{ours}mlp.fc2", f"{theirs}mlp.fc2", width, config.mlp_width),
    ]


def to_hf(config: VisionConfig) -> dict[str, Any]:
    """The CLIPVisionConfig of an encoder."""
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
    }


def from_hf(values: Any, where: str) -> VisionConfig:
    """The encoder that a CLIPVisionConfig describes; which features are taken stands elsewhere.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's encoder can express.
    """
    fields = Fields(values, DEFAULTS, where)
    fields.only("model_type", "clip_vision_model")
    fields.only("num_channels", 3)
    image_size, patch_size = fields.integer("image_size"), fields.integer("patch_size")
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if image_size < patch_size or width % heads:
        raise InputError(
            f"{where}: image_size {image_size} must hold a patch of {patch_size} and hidden_size {width} be a"
            f" multiple of num_attention_heads {heads}; correct config.json"
        )
    activation = fields.one_of("hidden_act", _ACTIVATIONS)
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=heads,
        mlp_width=fields.integer("intermediate_size"),
        activation=cast(Literal["quick_gelu", "gelu"], activation),
        norm_eps=fields.number("layer_norm_eps"),
        init_std=fields.number("initializer_range"),
    )
