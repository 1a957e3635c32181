"""The vision encoder of CLIP as transformers names it (CLIPVisionModel)."""

from __future__ import annotations

from typing import Any, Literal, cast

from megamm.config import ModelConfig, VisionConfig
from megamm.convert.family import Export, Family, Found, Reading, Target, model_type
from megamm.convert.fields import Fields
from megamm.convert.rules import Concat, Rename, Rule, Skip, Table, repeat
from megamm.convert.tables.positions import resized, wanted_size
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
    """Rules for keys that start with `prefix` ("vision_tower.vision_model." in LLaVA).

    Raises:
        InputError: the encoder is none of CLIP's.
    """
    check(config)
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
        *norm_rules("vision.pre_norm", f"{prefix}pre_layrnorm", width),  # sic
    ]
    found += repeat(config.num_layers, _block(config, f"{prefix}encoder.layers.{{n}}."))
    return [*found, *norm_rules("vision.post_norm", f"{prefix}post_layernorm", width)]


def check(config: VisionConfig) -> None:
    """Raises InputError unless CLIP's classes, in transformers as in open_clip, can express the encoder."""
    plain = VisionConfig()
    keys = ("patch_bias", "qkv_bias", "sub_norm", "residual", "rotary_side", "pre_norm", "post_norm")
    different = [key for key in keys if getattr(config, key) != getattr(plain, key)]
    if config.activation not in _ACTIVATIONS:
        different.append("activation")
    if different:
        found = ", ".join(f"{key} {getattr(config, key)}" for key in different)
        raise InputError(
            f"model.vision: CLIP has no encoder with {found}; choose a format for EVA's encoders"
        )


def norm_rules(ours: str, theirs: str, width: int) -> list[Rule]:
    """Weight and bias of a LayerNorm."""
    return [Rename(f"{ours}.{kind}", f"{theirs}.{kind}", (width,)) for kind in ("weight", "bias")]


def linear_rules(ours: str, theirs: str, outputs: int, inputs: int) -> list[Rule]:
    """Weight and bias of a linear layer."""
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
        *norm_rules(f"{ours}norm1", f"{theirs}layer_norm1", width),
        Concat(f"{ours}attention.qkv.weight", weights, (width, width)),
        Concat(f"{ours}attention.qkv.bias", biases, (width,)),
        *linear_rules(f"{ours}attention.proj", f"{attention}out_proj", width, width),
        *norm_rules(f"{ours}norm2", f"{theirs}layer_norm2", width),
        *linear_rules(f"{ours}mlp.fc1", f"{theirs}mlp.fc1", config.mlp_width, width),
        *linear_rules(f"{ours}mlp.fc2", f"{theirs}mlp.fc2", width, config.mlp_width),
    ]


def to_hf(config: VisionConfig) -> dict[str, Any]:
    """The CLIPVisionConfig of an encoder.

    Raises:
        InputError: the encoder is none of CLIP's.
    """
    check(config)
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


def table(config: VisionConfig) -> Table:
    """The complete mapping of a vision encoder alone (CLIPVisionModel), or of the one in a CLIPModel.

    Keys are those of transformers 4, which transformers 5 loads too; what it saves itself has no prefix.
    """
    modules = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    aliases = [(name, f"vision_model.{name}") for name in modules]
    return Table(rules(config, "vision_model."), [*SKIPS, *TEXT_TOWER], aliases)


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    values: Any = found.config
    where = found.where
    if values["model_type"] == "clip":
        where, section = f"{where}, vision_config", values.get("vision_config")
        values = {"model_type": "clip_vision_model", **section} if isinstance(section, dict) else section
    source = from_hf(values, where)
    vision = wanted_size(source, wanted)
    mapping = table(source)
    mapping.rules = resized(mapping.rules, source, vision)
    return Reading(("vision",), ModelConfig(vision=vision), mapping, leaves_open=FEATURES)


def _config(target: Target) -> dict[str, Any]:
    name = str(target.dtype).removeprefix("torch.")
    return {**to_hf(target.model.vision), "dtype": name, "torch_dtype": name}


# What the weights of an encoder alone do not say: which of its features are taken.
FEATURES = frozenset({"vision.feature_layer", "vision.feature_select", "vision.feature_norm"})
FAMILY = Family(
    "clip",
    model_type("clip", "clip_vision_model"),
    _read,
    Export(("vision",), lambda model: table(model.vision), _config),
)
