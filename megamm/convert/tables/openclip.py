"""The vision encoders of OpenCLIP as open_clip names them (open_clip.transformer.VisionTransformer)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megamm.config import ModelConfig, VisionConfig
from megamm.convert.engine import read_json, write_json
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields
from megamm.convert.rules import Rename, Rule, Skip, Table, repeat
from megamm.convert.tables.clip import FEATURES, check, linear_rules, norm_rules
from megamm.convert.tables.positions import resized, wanted_size
from megamm.errors import InputError

CONFIG_FILE = "open_clip_config.json"

# What open_clip_config.json leaves out of its vision_cfg has the default of its class (CLIPVisionCfg).
DEFAULTS: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "attentional_pool": False,
    "no_ln_pre": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "pool_type": "tok",
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
_MUST_BE_DEFAULT = tuple(DEFAULTS)[6:]
_MUST_BE_ABSENT = ("ls_init_value", "act_kwargs", "norm_kwargs", "timm_model_name")


def rules(config: VisionConfig, prefix: str = "visual.") -> list[Rule]:
    """Rules for keys that start with `prefix`.

    Raises:
        InputError: the encoder is none of CLIP's.
    """
    check(config)
    width, patch = config.width, config.patch_size
    found: list[Rule] = [
        Rename("vision.class_embedding", f"{prefix}class_embedding", (width,)),
        Rename("vision.patch_embedding.weight", f"{prefix}conv1.weight", (width, 3, patch, patch)),
        Rename("vision.position_embedding", f"{prefix}positional_embedding", (1 + config.num_patches, width)),
        *norm_rules("vision.pre_norm", f"{prefix}ln_pre", width),
    ]
    found += repeat(config.num_layers, _block(config, f"{prefix}transformer.resblocks.{{n}}."))
    return [*found, *norm_rules("vision.post_norm", f"{prefix}ln_post", width)]


def _block(config: VisionConfig, theirs: str) -> list[Rule]:
    ours, width, inner = "vision.blocks.{n}.", config.width, config.mlp_width
    return [
        *norm_rules(f"{ours}norm1", f"{theirs}ln_1", width),
        Rename(f"{ours}attention.qkv.weight", f"{theirs}attn.in_proj_weight", (3 * width, width)),
        Rename(f"{ours}attention.qkv.bias", f"{theirs}attn.in_proj_bias", (3 * width,)),
        *linear_rules(f"{ours}attention.proj", f"{theirs}attn.out_proj", width, width),
        *norm_rules(f"{ours}norm2", f"{theirs}ln_2", width),
        *linear_rules(f"{ours}mlp.fc1", f"{theirs}mlp.c_fc", inner, width),
        *linear_rules(f"{ours}mlp.fc2", f"{theirs}mlp.c_proj", width, inner),
    ]


# The text tower of a whole CLIP, and what compares the two.
SKIPS = [
    Skip(r"(visual\.)?proj|logit_scale|logit_bias", "CLIP's contrastive head, which megamm does not use"),
    Skip(
        r"(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|attn_mask|text\..*",
        "CLIP's text tower, which megamm does not use",
    ),
]


def to_open_clip(config: VisionConfig) -> dict[str, Any]:
    """The vision_cfg of an encoder; whether it is quick_gelu stands beside it, in model_cfg.

    Raises:
        InputError: the encoder is none of CLIP's.
    """
    check(config)
    if config.norm_eps != 1e-5:
        raise InputError(f"model.vision.norm_eps: is {config.norm_eps:g}, but OpenCLIP's encoders have 1e-5")
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layers": config.num_layers,
        "width": config.width,
        "head_width": config.head_dim,
        "mlp_ratio": ratio(config.mlp_width, config.width),
    }


def from_open_clip(model_cfg: Any, where: str) -> VisionConfig:
    """The encoder that the model_cfg of open_clip_config.json describes.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's encoder can express.
    """
    model = Fields(model_cfg, {"quick_gelu": False}, where)
    fields = Fields(model.get("vision_cfg"), DEFAULTS, f"{where}, vision_cfg")
    for key in _MUST_BE_ABSENT:
        fields.only(key, None)
    for key in _MUST_BE_DEFAULT:
        fields.only(key, DEFAULTS[key])
    width, head_dim = fields.integer("width"), fields.integer("head_width")
    image_size, patch_size = fields.integer("image_size"), fields.integer("patch_size")
    if width % head_dim or image_size < patch_size:
        raise InputError(
            f"{where}: width {width} must be a multiple of head_width {head_dim} and image_size {image_size}"
            f" hold a patch of {patch_size}; correct open_clip_config.json"
        )
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        num_layers=fields.integer("layers"),
        num_heads=width // head_dim,
        mlp_width=int(width * fields.number("mlp_ratio")),
        activation="quick_gelu" if model.flag("quick_gelu") else "gelu",
        norm_eps=1e-5,
    )


def ratio(mlp_width: int, width: int) -> float:
    """The number r for which int(width * r) is `mlp_width`, which is how open_clip and timm say it."""
    found = mlp_width / width
    return found if int(width * found) == mlp_width else (mlp_width + 0.5) / width


def table(config: VisionConfig) -> Table:
    """The complete mapping of the vision encoder in a CLIP of open_clip."""
    return Table(rules(config), SKIPS)


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    path = found.path / CONFIG_FILE
    if path.is_file():
        source = from_open_clip(read_json(path).get("model_cfg"), str(path))
    else:
        source = from_recipe(wanted, found.where)
    vision = wanted_size(source, wanted)
    mapping = Table(resized(rules(source), source, vision), SKIPS)
    return Reading(("vision",), ModelConfig(vision=vision), mapping, leaves_open=FEATURES)


def from_recipe(wanted: ModelConfig | None, where: str) -> VisionConfig:
    """The encoder in weights that come without a configuration: that of the recipe, at their image size.

    Raises:
        InputError: there is no recipe.
    """
    if wanted is None:
        raise InputError(f"{where}: weights without a configuration; say with --recipe what encoder it is")
    size = wanted.vision.weights_image_size or wanted.vision.image_size
    return replace(wanted.vision, image_size=size)


def _write_config(target: Target) -> None:
    quick = target.model.vision.activation == "quick_gelu"
    model_cfg = {"vision_cfg": to_open_clip(target.model.vision), "quick_gelu": quick}
    write_json(target.directory / CONFIG_FILE, {"model_cfg": model_cfg})


FAMILY = Family(
    "openclip",
    lambda found: "visual.conv1.weight" in found.tensors.keys(),  # noqa: SIM118 (it is no mapping)
    _read,
    Export(("vision",), lambda model: table(model.vision), None, _write_config),
)
