"""Frozen parts and last blocks: who has a gradient, and that the others' are unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamm.engine.groups import Groups
from megamm.errors import InputError
from megamm.models.freezing import part_of
from tests.dist.tiny import KINDS, tiny_batch, tiny_recipe
from tests.one_process import build, whole


def gradients(layout: Groups, assembly: str, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    recipe = tiny_recipe(assembly, overrides)
    model = build(recipe, layout)
    model(tiny_batch(recipe, 0)).sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return whole(model, lambda p: p.grad)


@pytest.mark.parametrize("frozen", ["language", "vision", "connector"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_part_has_no_gradient_and_changes_no_other(layout: Groups, kind: str, frozen: str) -> None:
    everything = gradients(layout, kind, {})
    got = gradients(layout, kind, {"training.freeze": f"[{frozen}]"})
    assert got.keys() == {name for name in everything if part_of(name) != frozen}
    assert 0 < len(got) < len(everything)
    for name, gradient in got.items():
        # a frozen linear passes gradients on by another product: equal but for rounding
        scale = float(everything[name].abs().max()) + 1e-8
        torch.testing.assert_close(gradient, everything[name], rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("assembly", ["merged", "cross_attention"])
def test_the_last_blocks_of_frozen_parts_are_trained(layout: Groups, assembly: str) -> None:
    everything = gradients(layout, assembly, {})
    overrides = {
        "training.freeze": "[vision, language]",
        "training.unfreeze.vision": 1,
        "training.unfreeze.language": 2,
    }
    got = gradients(layout, assembly, overrides)
    for name, gradient in got.items():
        assert torch.equal(gradient, everything[name]), name
    left_out = everything.keys() - got.keys()
    assert all(
        name.startswith(
            ("vision.blocks.0.", "vision.pre_norm", "vision.patch", "vision.class", "vision.position")
        )
        or name.startswith(("language.embedding", "language.decoder.layers.0.", "language.decoder.layers.1."))
        for name in left_out
    ), left_out
    assert {"language.output_layer.weight", "language.decoder.final_layernorm.weight"} <= got.keys()
    assert any(name.startswith("vision.blocks.1.") for name in got)  # the last one in use, of three
    assert not any(name.startswith("vision.blocks.2.") for name in got)
    if assembly == "cross_attention":  # a part of its own, not frozen with the decoder
        assert any(name.startswith("language.decoder.layers.1.gated_cross_attention") for name in got)


def test_gated_blocks_stay_frozen_when_the_decoder_around_them_is_trained(layout: Groups) -> None:
    overrides = {"training.freeze": "[language, cross_attention]", "training.unfreeze.language": 2}
    got = gradients(layout, "cross_attention", overrides)
    assert any(name.startswith("language.decoder.layers.3.") for name in got)
    assert not any("gated_cross_attention" in name for name in got)


def test_a_tied_output_layer_stays_frozen_with_the_embedding(layout: Groups) -> None:
    overrides = {
        "training.freeze": "[language]",
        "training.unfreeze.language": 3,
        "model.language.tie_embeddings": True,
    }
    got = gradients(layout, "merged", overrides)
    assert "language.decoder.final_layernorm.weight" in got
    assert not any("word_embeddings" in name or "output_layer" in name for name in got)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"training.unfreeze.vision": 1}, "training.unfreeze.vision: .* add vision to training.freeze"),
        ({"training.freeze": "[vision]", "training.unfreeze.vision": 2}, "give 0 to 1"),
        ({"training.freeze": "[language]", "training.unfreeze.language": -1}, "give 0 to 3"),
    ],
)
def test_what_cannot_be_unfrozen_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_recipe("merged", overrides)
