"""Every vision encoder against its public implementation: features and gradients in fp32, and the way of the
weights there and back, through the conversion tables.

The shapes are small and drawn so that no two sizes of an encoder are equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megamm.config import VisionConfig
from megamm.convert.rules import Rule, Skip, Table
from megamm.convert.tables import clip, eva, openclip
from megamm.models.vision.positions import resize_positions
from megamm.models.vision.vit import VisionTransformer
from tests.parity import references

TOLERANCE = 1e-5  # of the largest element

# image_size, patch_size, width, num_layers, num_heads, mlp_width
SHAPES = [(12, 4, 32, 3, 4, 40), (35, 7, 24, 2, 2, 57), (20, 5, 48, 4, 3, 130)]
SIZES = [
    dict(
        zip(("image_size", "patch_size", "width", "num_layers", "num_heads", "mlp_width"), shape, strict=True)
    )
    for shape in SHAPES
]
EVA: dict[str, Any] = dict(norm_eps=1e-6, patch_bias=True, qkv_bias="qv", pre_norm=False, activation="gelu")
LARGE: dict[str, Any] = {**EVA, "activation": "swiglu", "sub_norm": True}
# the variants, as their presets have them; "-336" stands for images of more patches than positions are for
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": dict(activation="quick_gelu"),
    "clip, gelu": dict(activation="gelu"),
    "openclip": dict(activation="gelu"),
    "openclip, quick_gelu": dict(activation="quick_gelu"),
    "eva g": EVA,
    "eva g, blip2": {**EVA, "post_norm": False},
    "eva L": {**LARGE, "rotary_side": 16},
    "eva L-336": {**LARGE, "rotary_side": 2},
    "eva E": {**EVA, "residual": "post_norm"},
}
# (features are taken from, norm applied, class token): LLaVA, InfiMM and IDEFICS, OpenFlamingo
TAKEN = [(-2, False, "patch"), (-1, False, "all"), (-1, True, "patch")]


@dataclass
class Reference:
    """A public implementation with random weights.

    Attributes:
        features: images to what ours has to give.
        rules, skips: the conversion table.
        named: parameter -> tensor, for all parameters, under the names that the table knows.
        finish: what the reference has besides, applied to our features.
    """

    features: Callable[[torch.Tensor], torch.Tensor]
    rules: list[Rule]
    skips: list[Skip]
    named: Callable[[Callable[[nn.Parameter], torch.Tensor]], dict[str, torch.Tensor]]
    finish: Callable[[torch.Tensor], torch.Tensor] = lambda x: x


def scramble(module: nn.Module) -> None:
    """Random weights everywhere; those of norms around 1, so that no gradient vanishes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_norm), std=0.3)


def named_of(
    module: nn.Module, prefix: str = ""
) -> Callable[[Callable[[nn.Parameter], torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda get: {prefix + name: get(p) for name, p in module.named_parameters()}


def select(config: VisionConfig, features: torch.Tensor) -> torch.Tensor:
    return features[:, 1:] if config.feature_select == "patch" else features


def clip_reference(config: VisionConfig) -> Reference:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    module = CLIPVisionModel(CLIPVisionConfig(**clip.to_hf(config))).eval()
    scramble(module)

    def features(images: torch.Tensor) -> torch.Tensor:
        hidden = module(images, output_hidden_states=True).hidden_states
        assert len(hidden) == config.num_layers + 1
        taken = hidden[config.feature_layer]
        return select(config, module.post_layernorm(taken) if config.feature_norm else taken)

    return Reference(features, clip.rules(config), clip.SKIPS, named_of(module))


def openclip_reference(config: VisionConfig) -> Reference:
    from_table = openclip.to_open_clip(config)
    model_cfg = {"vision_cfg": from_table, "quick_gelu": config.activation == "quick_gelu"}
    assert openclip.from_open_clip(model_cfg, "x") == replace(
        config, feature_layer=-2, feature_select="patch", feature_norm=False
    )
    build = references.open_clip().model._build_vision_tower
    module = build(12, {**from_table, "output_tokens": True}, model_cfg["quick_gelu"]).eval()
    scramble(module)

    def features(images: torch.Tensor) -> torch.Tensor:
        if config.feature_norm and config.feature_layer == -1:
            return module(images)[1]  # as OpenFlamingo takes them
        return select(config, output_of(module.transformer.resblocks[config.feature_layer], module, images))

    return Reference(features, openclip.rules(config), openclip.SKIPS, named_of(module, "visual."))


def output_of(part: nn.Module, whole: nn.Module, images: torch.Tensor) -> torch.Tensor:
    found = []
    handle = part.register_forward_hook(lambda module, inputs, output: found.append(output))
    whole(images)
    handle.remove()
    return found[0]


def eva_module(config: VisionConfig) -> nn.Module:
    values = eva.to_timm(config)
    wanted = replace(config, feature_layer=-2, feature_select="patch", feature_norm=False)
    assert eva.from_timm(json.loads(json.dumps(values)), "x") == wanted
    module = references.timm().create_model(values["architecture"], num_classes=5, **values["model_args"])
    scramble(module)
    return module.eval()


def eva_reference(config: VisionConfig) -> Reference:
    module = eva_module(config)

    def features(images: torch.Tensor) -> torch.Tensor:
        if config.feature_norm and config.feature_layer == -1:
            return select(config, module.forward_features(images))
        return select(config, output_of(module.blocks[config.feature_layer], module, images))

    return Reference(features, eva.rules(config, names="timm"), eva.skips(), named_of(module))


_BLIP2_NAMES = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding": "patch_embed.proj",
    "encoder.layers": "blocks",
    "layer_norm": "norm",
    "self_attn.projection": "attn.proj",
    "self_attn": "attn",
}


def blip2_reference(config: VisionConfig) -> Reference:
    """EVA-g without its last norm; BLIP-2's own norm of the features is part of the reference only."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    assert config.feature_layer == -1 and config.feature_select == "all"
    theirs = Blip2VisionConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        layer_norm_eps=config.norm_eps,
    )
    module = Blip2VisionModel(theirs).eval()
    scramble(module)
    module.post_layernorm.eps = 1e-5
    with torch.no_grad():
        for layer in module.encoder.layers:  # a slot for the bias of the keys, which EVA does not have
            layer.self_attn.qkv.bias[config.width : 2 * config.width] = 0

    def named(get: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in module.named_parameters():
            for theirs, baai in _BLIP2_NAMES.items():
                name = name.replace(theirs, baai)
            if name.endswith("qkv.bias"):
                query, _, value = get(parameter).chunk(3)
                found[name.replace("qkv.bias", "q_bias")] = query
                found[name.replace("qkv.bias", "v_bias")] = value
            elif not name.startswith("post_"):
                found[name] = get(parameter)
        return {f"visual_encoder.{name}": value for name, value in found.items()}

    return Reference(
        lambda images: module(images).last_hidden_state,
        eva.rules(config, "visual_encoder."),
        eva.skips("visual_encoder."),
        named,
        module.post_layernorm,
    )


def reference(variant: str, config: VisionConfig) -> Reference:
    torch.manual_seed(0)
    if variant == "eva g, blip2":
        return blip2_reference(config)
    makers = {"clip": clip_reference, "openclip": openclip_reference, "eva": eva_reference}
    return makers[variant.split(",")[0].split()[0]](config)


def converted(rules: list[Rule], theirs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {rule.ours: rule.to_ours([theirs[key] for key in rule.theirs]) for rule in rules}


def encoder(config: VisionConfig, weights: Mapping[str, torch.Tensor]) -> VisionTransformer:
    ours = VisionTransformer(config)
    ours.load_state_dict({name.removeprefix("vision."): value for name, value in weights.items()})
    return ours


def assert_close(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    size = wanted.abs().max()
    difference = (found - wanted).abs().max()
    assert found.shape == wanted.shape and size > 0, name
    assert difference <= TOLERANCE * size, f"{name}: {difference:.3g} beside {size:.3g}"


def cases() -> list[Any]:
    """Every variant in every shape, the ways of taking features dealt over the shapes."""
    return [
        pytest.param(variant, sizes, taken, id=f"{variant}-{sizes['width']}")
        for variant in VARIANTS
        for sizes, taken in zip(SIZES, TAKEN, strict=True)
    ]


@pytest.mark.parametrize(("variant", "sizes", "taken"), cases())
def test_features_gradients_and_weights(variant: str, sizes: dict[str, int], taken: Any) -> None:
    layer, norm, feature_select = (-1, False, "all") if variant == "eva g, blip2" else taken
    config = VisionConfig(
        **sizes, **VARIANTS[variant], feature_layer=layer, feature_norm=norm, feature_select=feature_select
    )
    theirs = reference(variant, config)
    table = Table(theirs.rules, theirs.skips)
    weights = theirs.named(lambda p: p.detach())
    skipped = table.account(weights, "the reference")
    assert all(key.endswith(("proj", "head.weight", "head.bias")) for key in skipped)
    ours = encoder(config, converted(table.rules, weights))

    images = torch.randn(3, 3, config.image_size, config.image_size)
    found, wanted = theirs.finish(ours(images)), theirs.features(images)
    assert_close(found, wanted, "features")

    direction = torch.randn_like(wanted)
    (found * direction).sum().backward()
    own = {f"vision.{name}": p.grad for name, p in ours.named_parameters()}
    (wanted * direction).sum().backward()
    compare_gradients(table, own, theirs.named(lambda p: torch.zeros_like(p) if p.grad is None else p.grad))
    for rule in table.rules:
        there = rule.to_theirs(rule.to_ours([weights[key] for key in rule.theirs]))
        assert all(torch.equal(a, weights[key]) for a, key in zip(there, rule.theirs, strict=True))


def compare_gradients(
    table: Table, ours: Mapping[str, torch.Tensor | None], theirs: Mapping[str, torch.Tensor]
) -> None:
    """Every gradient, in the tensors of ours: alone, that of CLIP's key biases would be rounding only."""
    for rule in table.rules:
        found, wanted = ours[rule.ours], rule.to_ours([theirs[key] for key in rule.theirs])
        if found is None:  # behind the features
            assert not wanted.any(), rule.ours
        else:
            assert_close(found, wanted, f"gradient of {rule.ours}")


@pytest.mark.parametrize("variant", ["eva g", "eva L", "eva E"])
def test_weights_under_the_names_of_the_authors(variant: str) -> None:
    """Ours, written under BAAI's names, and read by timm's own converter of their files."""
    config = VisionConfig(**SIZES[0], **VARIANTS[variant], feature_layer=-1, feature_select="all")
    theirs = eva_module(config)
    timm_names = eva.rules(config, names="timm")
    weights = converted(timm_names, dict(theirs.state_dict()))
    baai = {
        key: value
        for rule in eva.rules(config, "visual.")
        for key, value in zip(rule.theirs, rule.to_theirs(weights[rule.ours]), strict=True)
    }
    assert ("visual.blocks.0.mlp.w1.weight" in baai) == (variant == "eva L")
    convert = references.timm().models.eva.checkpoint_filter_fn
    read = convert({**baai, "visual.rope.freqs_cos": torch.zeros(1)}, theirs)
    wanted = {key: value for key, value in theirs.state_dict().items() if not key.startswith("head.")}
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[key], value) for key, value in wanted.items())


def test_timm_opens_what_is_written(tmp_path: Path) -> None:
    """config.json and weights of a large EVA in a directory, the way timm reads it."""
    config = VisionConfig(**SIZES[1], **VARIANTS["eva L"], feature_layer=-1, feature_select="all")
    weights = converted(eva.rules(config, names="timm"), dict(eva_module(config).state_dict()))
    state = {
        key: value.contiguous()
        for rule in eva.rules(config, names="timm")
        for key, value in zip(rule.theirs, rule.to_theirs(weights[rule.ours]), strict=True)
    }
    (tmp_path / "config.json").write_text(json.dumps({**eva.to_timm(config), "pretrained_cfg": {}}))
    save_file(state, tmp_path / "model.safetensors")
    theirs = references.timm().create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        wanted = output_of(theirs.blocks[-1], theirs, images)
        assert_close(encoder(config, weights)(images), wanted, "features")


@pytest.mark.parametrize("side", [5, 7, 2])
@torch.no_grad()
def test_positions_of_another_resolution(side: int) -> None:
    """A CLIP encoder taken to other image sizes gives what transformers gives for them."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = VisionConfig(**SIZES[2], feature_layer=-1, feature_select="all")
    theirs = CLIPVisionModel(CLIPVisionConfig(**clip.to_hf(config))).eval()
    scramble(theirs)
    weights = converted(clip.rules(config), dict(theirs.state_dict()))
    weights["vision.position_embedding"] = resize_positions(weights["vision.position_embedding"], side)
    ours = encoder(replace(config, image_size=side * config.patch_size), weights)
    images = torch.randn(2, 3, side * config.patch_size, side * config.patch_size)
    wanted = theirs(images, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
    assert_close(ours(images), wanted, "features")
