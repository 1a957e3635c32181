"""Recomputation changes no gradient, frozen parts or not, and keeps less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamm.engine.groups import Groups
from megamm.models.vlm import VisionLanguageModel
from tests.dist.tiny import tiny_batch, tiny_recipe
from tests.one_process import build, whole

SETTINGS: dict[str, dict[str, Any]] = {
    "full": {"training.recompute.language": "full"},
    "first_layers": {"training.recompute.language": "full", "training.recompute.layers": 2},
    "selective": {
        "training.recompute.language": "selective",
        "training.recompute.modules": "[core_attn, mlp]",
    },
    "vision": {"training.recompute.vision": True},
    "connector": {"training.recompute.connector": True},
}
FROZEN = ["[]", "[vision, language]", "[vision, connector]", "[vision, connector, language]"]


def gradients(model: VisionLanguageModel, recipe: Any, index: int = 0) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the bytes that the forward pass kept for the backward pass."""
    kept: dict[int, int] = {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tiny_batch(recipe, index)).sum()
    loss.backward()
    return whole(model, lambda p: p.grad), sum(kept.values())


def frozen_recipe(assembly: str, frozen: str, overrides: dict[str, Any]) -> Any:
    if assembly == "merged" and frozen == "[vision, connector, language]":
        pytest.skip("nothing would be trained")
    return tiny_recipe(assembly, {"training.freeze": frozen, **overrides})


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("assembly", ["merged", "cross_attention"])
def test_gradients_are_the_same(layout: Groups, assembly: str, setting: str, frozen: str) -> None:
    plain = frozen_recipe(assembly, frozen, {})
    want, _ = gradients(build(plain, layout), plain)
    recipe = frozen_recipe(assembly, frozen, SETTINGS[setting])
    got, _ = gradients(build(recipe, layout), recipe)
    assert got.keys() == want.keys()
    assert any(gradient.abs().max() > 0 for gradient in got.values())
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize(
    "setting, at_most",
    [("full", 0.45), ("first_layers", 0.75), ("selective", 0.82), ("vision", 0.97), ("connector", 0.98)],
)
def test_less_is_kept(layout: Groups, setting: str, at_most: float) -> None:
    plain = tiny_recipe("cross_attention")
    _, everything = gradients(build(plain, layout), plain)
    recipe = tiny_recipe("cross_attention", SETTINGS[setting])
    _, kept = gradients(build(recipe, layout), recipe)
    assert kept <= at_most * everything, kept / everything


def test_nothing_is_kept_below_the_first_trained_layer(layout: Groups) -> None:
    """Of a frozen decoder below the first gated block, and of a frozen encoder."""
    frozen = {"training.freeze": "[vision, connector, language]", "model.cross_attention.every": 4}
    recipe = tiny_recipe("cross_attention", frozen)
    model = build(recipe, layout)
    kept_in: set[str] = set()
    current = [""]

    def enter(name: str) -> Any:
        return lambda module, args, kwargs=None: current.__setitem__(0, name)

    for number, layer in enumerate(model.language.decoder.layers):
        layer.register_forward_pre_hook(enter(f"layer {number}"))
    model.vision.register_forward_pre_hook(enter("vision"))
    model.connector.register_forward_pre_hook(enter("connector"))
    model.language.embedding.register_forward_pre_hook(enter("embedding"))

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept_in.add(current[0])
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tiny_batch(recipe, 0))
    assert kept_in == {"layer 3"}  # with its gated block, and what comes behind
