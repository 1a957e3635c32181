"""The vision encoders of EVA-CLIP, as their authors name them (BAAI's releases, and BLIP-2, InfiMM and
InternLM-XComposer after them) and as timm does."""

from __future__ import annotations

import re
from typing import Any, Literal

from megamm.config import ModelConfig, VisionConfig
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields
from megamm.convert.rules import Concat, Rename, Reshape, Rule, Skip, Table, repeat
from megamm.convert.tables.clip import FEATURES, linear_rules, norm_rules
from megamm.convert.tables.openclip import from_recipe, ratio
from megamm.convert.tables.positions import resized, wanted_size
from megamm.errors import InputError

Names = Literal["baai", "timm"]
# name among ours: (BAAI's, timm's), within a block
_SUB_NORMS = {"attention.norm": ("attn.inner_attn_ln", "attn.norm"), "mlp.norm": ("mlp.ffn_ln", "mlp.norm")}
_GATES = {"baai": ("mlp.w1", "mlp.w2"), "timm": ("mlp.fc1_g", "mlp.fc1_x")}
_DOWN = {"baai": "mlp.w3", "timm": "mlp.fc2"}


def rules(config: VisionConfig, prefix: str = "", names: Names = "baai") -> list[Rule]:
    """Rules for keys that start with `prefix`: "visual." in BAAI's files, "visual_encoder." in
    InternLM-XComposer's.

    Raises:
        InputError: the encoder is none of EVA's.
    """
    check(config)
    width, patch, positions = config.width, config.patch_size, 1 + config.num_patches
    found: list[Rule] = [
        Reshape("vision.class_embedding", f"{prefix}cls_token", (width,), (1, 1, width)),
        Reshape("vision.position_embedding", f"{prefix}pos_embed", (positions, width), (1, positions, width)),
        Rename("vision.patch_embedding.weight", f"{prefix}patch_embed.proj.weight", (width, 3, patch, patch)),
        Rename("vision.patch_embedding.bias", f"{prefix}patch_embed.proj.bias", (width,)),
    ]
    theirs = f"{prefix}blocks.{{n}}."
    block = [*_attention(config, theirs, names), *_feed_forward(config, theirs, names)]
    found += repeat(config.num_layers, block)
    return found + (norm_rules("vision.post_norm", f"{prefix}norm", width) if config.post_norm else [])


def skips(prefix: str = "") -> list[Skip]:
    """What is left out of an encoder whose keys start with `prefix`."""
    start = re.escape(prefix)
    return [
        Skip(
            rf"{start}(blocks\.\d+\.attn\.)?rope\.(freqs_(cos|sin)|bands|pos_embed)",
            "a buffer, computed from the number of patches",
        ),
        Skip(rf"{start}head\.(weight|bias)", "CLIP's contrastive head, which megamm does not use"),
    ]


TEXT_TOWER = [
    Skip(r"text\..*", "CLIP's text tower, which megamm does not use"),
    Skip(r"logit_scale", "CLIP's contrastive head, which megamm does not use"),
]


def check(config: VisionConfig) -> None:
    """Raises InputError unless EVA's classes can express the encoder."""
    fits = config.patch_bias and config.qkv_bias == "qv" and not config.pre_norm
    if not fits or config.activation == "quick_gelu":
        raise InputError(
            "model.vision: EVA's encoders have patch_bias true, qkv_bias qv, pre_norm false and activation"
            " gelu or swiglu, but this one does not; choose a format for CLIP's encoders"
        )


def _attention(config: VisionConfig, theirs: str, names: Names) -> list[Rule]:
    ours, width = "vision.blocks.{n}.", config.width
    bias = {"q": f"{theirs}attn.q_bias", "v": f"{theirs}attn.v_bias"}
    found = norm_rules(f"{ours}norm1", f"{theirs}norm1", width)
    if config.sub_norm:  # the three projections are separate
        parts = tuple(f"{theirs}attn.{part}_proj.weight" for part in "qkv")
        found.append(Concat(f"{ours}attention.qkv.weight", parts, (width, width)))
        found += _sub_norm(f"{ours}attention.norm", theirs, names, width)
        if names == "timm":
            bias = {part: f"{theirs}attn.{part}_proj.bias" for part in "qv"}
    else:
        found.append(
            Rename(f"{ours}attention.qkv.weight", f"{theirs}attn.qkv.weight", (3 * width, width)),
        )
    found += [Rename(f"{ours}attention.{part}_bias", name, (width,)) for part, name in bias.items()]
    return found + linear_rules(f"{ours}attention.proj", f"{theirs}attn.proj", width, width)


def _feed_forward(config: VisionConfig, theirs: str, names: Names) -> list[Rule]:
    ours, width, inner = "vision.blocks.{n}.", config.width, config.mlp_width
    found = norm_rules(f"{ours}norm2", f"{theirs}norm2", width)
    if config.sub_norm:
        found += _sub_norm(f"{ours}mlp.norm", theirs, names, inner)
    if config.activation != "swiglu":
        found += linear_rules(f"{ours}mlp.fc1", f"{theirs}mlp.fc1", inner, width)
        return found + linear_rules(f"{ours}mlp.fc2", f"{theirs}mlp.fc2", width, inner)
    gate, value = (f"{theirs}{name}" for name in _GATES[names])
    found.append(Concat(f"{ours}mlp.fc1.weight", (f"{gate}.weight", f"{value}.weight"), (inner, width)))
    found.append(Concat(f"{ours}mlp.fc1.bias", (f"{gate}.bias", f"{value}.bias"), (inner,)))
    return found + linear_rules(f"{ours}mlp.fc2", f"{theirs}{_DOWN[names]}", width, inner)


def _sub_norm(ours: str, theirs: str, names: Names, size: int) -> list[Rule]:
    baai, timm = _SUB_NORMS[ours.removeprefix("vision.blocks.{n}.")]
    return norm_rules(ours, f"{theirs}{baai if names == 'baai' else timm}", size)


# timm's architectures: sizes and variants, as its model functions give them.
_LARGE: dict[str, Any] = {
    "embed_dim": 1024,
    "depth": 24,
    "num_heads": 16,
    "mlp_ratio": 4 * 2 / 3,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "scale_attn_inner": True,
    "use_rot_pos_emb": True,
    "use_post_norm": False,
    "ref_feat_shape": [16, 16],
    "qkv_fused": False,
}
_PLAIN: dict[str, Any] = {
    "swiglu_mlp": False,
    "scale_mlp": False,
    "scale_attn_inner": False,
    "use_rot_pos_emb": False,
    "ref_feat_shape": None,
    "qkv_fused": True,
}
_GIANT = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408, "use_post_norm": False}
_ENORMOUS = {
    "embed_dim": 1792,
    "depth": 64,
    "num_heads": 16,
    "mlp_ratio": 15360 / 1792,
    "use_post_norm": True,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    name: {"patch_size": 14, "qkv_bias": True, **sizes}
    for name, sizes in {
        "eva_giant_patch14_clip_224": {"img_size": 224, **_PLAIN, **_GIANT},
        "eva02_large_patch14_clip_224": {"img_size": 224, **_LARGE},
        "eva02_large_patch14_clip_336": {"img_size": 336, **_LARGE},
        "eva02_enormous_patch14_clip_224": {"img_size": 224, **_PLAIN, **_ENORMOUS},
    }.items()
}


def from_timm(config: Any, where: str) -> VisionConfig:
    """The encoder that timm's config.json describes: an architecture, and in model_args what differs from it.

    Raises:
        InputError: the architecture is not known, or a value is nothing that megamm's encoder can express.
    """
    top = Fields(config, {"model_args": {}}, where)
    name = top.one_of("architecture", {known: known for known in ARCHITECTURES})
    defaults = ARCHITECTURES[name]
    fields = Fields(top.get("model_args"), defaults, f"{where}, model_args")
    for key in ("qkv_bias", "qkv_fused", "swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_rot_pos_emb"):
        fields.only(key, defaults[key])
    fields.only("use_post_norm", defaults["use_post_norm"])
    image_size, patch_size = fields.integer("img_size"), fields.integer("patch_size")
    width, heads = fields.integer("embed_dim"), fields.integer("num_heads")
    if width % heads or image_size < patch_size:
        raise InputError(
            f"{where}: embed_dim {width} must be a multiple of num_heads {heads} and img_size {image_size}"
            f" hold a patch of {patch_size}; correct config.json"
        )
    swiglu = bool(defaults["swiglu_mlp"])
    return VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        num_layers=fields.integer("depth"),
        num_heads=heads,
        mlp_width=int(width * fields.number("mlp_ratio")),
        activation="swiglu" if swiglu else "gelu",
        norm_eps=1e-6,
        patch_bias=True,
        qkv_bias="qv",
        sub_norm=swiglu,
        residual="post_norm" if defaults["use_post_norm"] else "pre_norm",
        rotary_side=_side(fields) if swiglu else None,
        pre_norm=False,
    )


def _side(fields: Fields) -> int:
    shape = fields.get("ref_feat_shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or shape[0] != shape[1]
        or not isinstance(shape[0], int)
    ):
        raise InputError(
            f"{fields.where}: ref_feat_shape is {shape!r}, but must be two equal numbers; choose another"
            " model"
        )
    return shape[0]


def to_timm(config: VisionConfig) -> dict[str, Any]:
    """timm's config.json of an encoder.

    Raises:
        InputError: the encoder is none of EVA-CLIP's.
    """
    check(config)
    name = _architecture(config)
    values: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.num_layers,
        "num_heads": config.num_heads,
        "mlp_ratio": ratio(config.mlp_width, config.width),
    }
    if config.rotary_side:
        values["ref_feat_shape"] = [config.rotary_side, config.rotary_side]
    different = {key: value for key, value in values.items() if value != ARCHITECTURES[name][key]}
    return {"architecture": name, "num_classes": 0, "model_args": different}


def _architecture(config: VisionConfig) -> str:
    """The architecture of timm that differs from an encoder in sizes alone."""
    variant = (
        config.activation == "swiglu",
        config.sub_norm,
        config.rotary_side is not None,
        config.residual,
    )
    names = {
        (False, False, False, "pre_norm"): "eva_giant_patch14_clip_224",
        (False, False, False, "post_norm"): "eva02_enormous_patch14_clip_224",
        (
            True,
            True,
            True,
            "pre_norm",
        ): f"eva02_large_patch14_clip_{336 if config.image_size == 336 else 224}",
    }
    if variant not in names or not config.post_norm or config.norm_eps != 1e-6:
        raise InputError(
            "model.vision: timm's EVA-CLIP encoders are those of EVA01-CLIP-g, EVA02-CLIP-L and EVA02-CLIP-E,"
            " with post_norm true and norm_eps 1e-6; this one is another"
        )
    return names[variant]


# Where the keys of an encoder start: alone; in BAAI's CLIP; in open_clip's CLIP, under timm's names.
_PREFIXES: dict[str, Names] = {"": "baai", "visual.": "baai", "visual.trunk.": "timm"}


def _prefix(found: Found) -> str | None:
    keys = set(found.tensors.keys())
    return next((prefix for prefix in _PREFIXES if f"{prefix}patch_embed.proj.weight" in keys), None)


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    prefix = _prefix(found) or ""
    names = _PREFIXES[prefix]
    if "architecture" in found.config:
        source, names = from_timm(found.config, found.where), "timm"
    else:
        source = from_recipe(wanted, found.where)
    vision = wanted_size(source, wanted)
    mapping = rules(source, prefix, names)
    left_out = [*skips(prefix), *TEXT_TOWER, *_cut(source, prefix)]
    return Reading(
        ("vision",),
        ModelConfig(vision=vision),
        Table(resized(mapping, source, vision), left_out),
        leaves_open=FEATURES,
    )


def _cut(config: VisionConfig, prefix: str) -> list[Skip]:
    """BLIP-2's encoder is BAAI's without its last block and norm, but released as a whole."""
    if config.post_norm:
        return []
    last = rf"{re.escape(prefix)}(norm|blocks\.{config.num_layers})\..*"
    return [Skip(last, "behind the features that BLIP-2 takes")]


def _config(target: Target) -> dict[str, Any]:
    vision, image = target.model.vision, target.recipe.data.image
    pixels = {"input_size": [3, vision.image_size, vision.image_size], "mean": image.mean, "std": image.std}
    return {**to_timm(vision), "pretrained_cfg": {**pixels, "interpolation": "bicubic"}}


FAMILY = Family(
    "eva",
    lambda found: _prefix(found) is not None,
    _read,
    Export(("vision",), lambda model: Table(rules(model.vision, names="timm")), _config),
)
