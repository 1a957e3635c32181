"""Vision transformers: their sizes, and what is used and trained of them. (That they compute what the public
ones do is in tests/parity/test_vision.py.)"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megamm.config import VisionConfig
from megamm.engine.groups import Groups
from megamm.errors import InputError
from megamm.models.vision.positions import resize_positions
from megamm.models.vision.vit import VisionTransformer
from megamm.recipe import recipe_from_dict, validate
from tests.dist.tiny import tiny_batch, tiny_recipe
from tests.one_process import build, whole

CONFIG = VisionConfig(
    image_size=24, patch_size=8, width=32, num_layers=4, num_heads=4, mlp_width=40, norm_eps=1e-4
)
EVA: dict[str, Any] = {"patch_bias": True, "qkv_bias": "qv", "pre_norm": False, "activation": "gelu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "g": EVA,
    "g, blip2": {**EVA, "post_norm": False},
    "g, normed": {**EVA, "feature_norm": True},
    "L": {**EVA, "activation": "swiglu", "sub_norm": True, "rotary_side": 2},
    "E": {**EVA, "residual": "post_norm"},
}


def encoder(config: VisionConfig) -> VisionTransformer:
    found = VisionTransformer(config)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(std=0.3)
    return found


# OpenCLIP's counts without the projection into CLIP's common space, which its own include
@pytest.mark.parametrize(
    ("preset", "num_parameters"),
    [
        ("clip-vit-l-14", 303_179_776),
        ("clip-vit-l-14-336", 303_507_456),
        ("openclip-vit-h-14", 632_076_800 - 1280 * 1024),
        ("openclip-vit-g-14", 1_012_645_632 - 1408 * 1024),
        ("openclip-vit-bigg-14", 1_844_907_264 - 1664 * 1280),
        ("eva01-clip-g-14", 1_011_146_112),
        ("eva01-clip-g-14-blip2", 985_894_528),
        ("eva02-clip-l-14", 303_317_952),
        ("eva02-clip-l-14-336", 303_645_632),
        ("eva02-clip-e-14", 4_348_720_896),
    ],
)
def test_parameters_of_presets(preset: str, num_parameters: int) -> None:
    model = {"language": {"preset": "vicuna-13b"}, "vision": {"preset": preset}}
    recipe = recipe_from_dict({"name": "x", "run_dir": "x", "tokenizer": "x", "model": model})
    with torch.device("meta"):
        found = VisionTransformer(recipe.model.vision)
    assert sum(parameter.numel() for parameter in found.parameters()) == num_parameters


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_patch_sees_every_other(variant: str) -> None:
    found = encoder(replace(CONFIG, **VARIANTS[variant]))
    images = torch.randn(3, 3, 24, 24)
    changed = images.clone()
    changed[1, :, -8:, -8:] += 1.0  # the last patch of the second image
    difference = (found(changed) - found(images)).abs().amax(dim=-1)
    assert difference.shape == (3, 9) and difference[1].min() > 1e-4
    assert not difference[[0, 2]].any()


@pytest.mark.parametrize(("layer", "used"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (2, 2), (4, 4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_unused_modules_are_exactly_those_without_gradient(variant: str, layer: int, used: int) -> None:
    found = encoder(replace(CONFIG, feature_layer=layer, **VARIANTS[variant]))
    found(torch.randn(1, 3, 24, 24)).sum().backward()
    unused = {id(p) for module in found.unused_modules() for p in module.parameters()}
    without = {id(p) for p in found.parameters() if p.grad is None}
    assert unused == without and found.num_used_blocks == used


def test_keys_without_bias_stay_without_one() -> None:
    """Trained with decay, the keys of a zero image are still zero before the rotation."""
    found = encoder(replace(CONFIG, feature_layer=-1, **EVA))
    optimizer = torch.optim.AdamW(found.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        found(torch.randn(2, 3, 24, 24)).square().sum().backward()
        optimizer.step()
    attention = found.blocks[0].attention
    assert isinstance(attention.qkv, nn.Linear)
    q, k, v = attention._project(torch.zeros(1, 1, 32)).chunk(3, dim=-1)
    assert not k.any() and q.all() and v.all()
    assert "bias" not in {name for name, _ in attention.qkv.named_parameters()}


def settings(variant: str, **others: Any) -> dict[str, Any]:
    chosen = {**VARIANTS[variant], **others}
    return {f"model.vision.{key}": str(value).lower() for key, value in chosen.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_and_freezing_change_no_gradient(layout: Groups, variant: str) -> None:
    def gradients(overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
        recipe = tiny_recipe("merged", {**settings(variant, feature_layer=-1), **overrides})
        model = build(recipe, layout)
        model(tiny_batch(recipe, 0)).sum().backward()
        return whole(model, lambda p: p.grad)

    everything = gradients({})
    freeze = {"training.freeze": "[vision]", "training.unfreeze.vision": 2}
    for overrides in ({"training.recompute.vision": True}, freeze):
        got = gradients(overrides)
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, everything[name], rtol=1e-5, atol=1e-7, msg=name)
    encoder_part = {name for name in got if name.startswith("vision.")}
    assert encoder_part == {
        name for name in everything if name.startswith(("vision.blocks.2.", "vision.post_norm"))
    }
    assert ("vision.post_norm.weight" in encoder_part) == VARIANTS[variant].get("feature_norm", False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_keep_their_place_and_type(dtype: torch.dtype) -> None:
    """Numbers of rows and of columns go on growing along rows and columns; the class token's stay."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    patches = torch.stack([rows, columns], dim=-1).flatten(0, 1)
    embedding = torch.cat([torch.tensor([[7.0, -7.0]]), patches]).to(dtype)
    assert resize_positions(embedding, 8) is embedding
    resized = resize_positions(embedding, 16)
    assert resized.shape == (257, 2) and resized.dtype == dtype
    assert resized[0].tolist() == [7.0, -7.0]
    square = resized[1:].float().unflatten(0, (16, 16))
    assert (square[1:, :, 0] > square[:-1, :, 0]).all() and (square[:, 1:, 0] == square[:, :-1, 0]).all()
    assert (square[:, 1:, 1] > square[:, :-1, 1]).all() and (square[1:, :, 1] == square[:-1, :, 1]).all()


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(IndexError):
        VisionTransformer(replace(CONFIG, feature_layer=5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model.vision.rotary_side": 2, "model.vision.width": 40},
            "40 / num_heads 4 = 10 is not divisible by 4",
        ),
        ({"model.vision.rotary_side": 0}, "model.vision.rotary_side: 0 is not positive"),
        ({"model.vision.post_norm": False, "model.vision.feature_norm": True}, "needs the norm"),
    ],
)
def test_encoders_that_cannot_be(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(tiny_recipe("merged", overrides))
