"""The vision transformer against transformers' CLIPVisionModel, through the conversion table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamm.config import VisionConfig
from megamm.convert.tables import clip
from megamm.models.vision.vit import VisionTransformer

CONFIG = VisionConfig(
    image_size=24, patch_size=8, width=32, num_layers=4, num_heads=4, mlp_width=40, norm_eps=1e-4
)


def both(config: VisionConfig) -> tuple[VisionTransformer, Any]:
    """The same random encoder on both sides."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    theirs = CLIPVisionModel(CLIPVisionConfig(**clip.to_hf(config))).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    source = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    rules = clip.rules(config)
    weights = {
        rule.ours.removeprefix("vision."): rule.to_ours([source[k] for k in rule.theirs]) for rule in rules
    }
    ours = VisionTransformer(config)
    ours.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize("layer", [-1, -2, -5, 1])
@pytest.mark.parametrize("select", ["patch", "all"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_features_are_those_of_transformers(layer: int, select: Any, activation: Any) -> None:
    config = replace(CONFIG, feature_layer=layer, feature_select=select, activation=activation)
    ours, theirs = both(config)
    images = torch.randn(2, 3, 24, 24)
    hidden = theirs(images, output_hidden_states=True).hidden_states
    assert len(hidden) == config.num_layers + 1
    wanted = hidden[layer] if select == "all" else hidden[layer][:, 1:]
    found = ours(images)
    assert found.shape == (2, config.num_features, config.width)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attention_is_not_causal() -> None:
    ours, _ = both(CONFIG)
    images = torch.randn(1, 3, 24, 24)
    changed = images.clone()
    changed[:, :, -8:, -8:] += 1.0  # the last patch
    difference = (ours(changed) - ours(images)).abs().amax(dim=-1)
    assert difference.shape == (1, 9) and difference.min() > 1e-4


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    ours, _ = both(CONFIG)
    images = torch.randn(3, 3, 24, 24)
    changed = images.clone()
    changed[1] = 0.0
    before, after = ours(images), ours(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize(("layer", "used"), [(-1, 4), (-2, 3), (-5, 0), (0, 0), (2, 2), (4, 4)])
def test_unused_modules_are_exactly_those_without_gradient(layer: int, used: int) -> None:
    ours, _ = both(replace(CONFIG, feature_layer=layer))
    ours(torch.randn(1, 3, 24, 24)).sum().backward()
    unused = {id(p) for module in ours.unused_modules() for p in module.parameters()}
    without = {id(p) for p in ours.parameters() if p.grad is None}
    assert unused == without and ours.num_used_blocks == used


def test_a_layer_that_does_not_exist() -> None:
    with pytest.raises(IndexError):
        VisionTransformer(replace(CONFIG, feature_layer=5))
