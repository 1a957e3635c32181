"""Random weights: one rule for every parameter, the same for every layout."""

from __future__ import annotations

import math
import re

import pytest
import torch

from megamm.engine.groups import Groups
from megamm.engine.weights import initialize
from megamm.models.initialization import initialization_table, weight_drawer
from megamm.models.vlm import build_model
from tests.dist.tiny import IMAGE_ID, tiny_recipe
from tests.one_process import whole

ASSEMBLIES = ["merged", "cross_attention"]


def drawn(assembly: str, layout: Groups, seed: int = 1) -> dict[str, torch.Tensor]:
    """All weights of a model that was full of NaN before."""
    recipe = tiny_recipe(assembly, {"seed": seed})
    models = build_model(recipe, layout, "local", IMAGE_ID)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.fill_(float("nan"))
    initialize(models, weight_drawer(recipe.model, recipe.seed))
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    return whole(models[0])


def test_every_parameter_has_a_rule_and_every_rule_a_parameter(layout: Groups) -> None:
    recipe = tiny_recipe("cross_attention")
    names = {name for assembly in ASSEMBLIES for name in drawn(assembly, layout)}
    assert len(names) > 80
    patterns = [pattern for pattern, _ in initialization_table(recipe.model)]
    first = {name: next(p for p in patterns if re.fullmatch(p, name)) for name in names}
    assert set(first.values()) == set(patterns)


@pytest.mark.parametrize("assembly", ASSEMBLIES)
def test_a_seed_decides_all_weights(assembly: str, layout: Groups) -> None:
    one, again, other = (drawn(assembly, layout, seed) for seed in (1, 1, 2))
    assert sorted(one) == sorted(again) == sorted(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name]), name
        constant = bool((tensor == tensor.flatten()[0]).all())
        assert torch.equal(tensor, other[name]) == constant, name
    random = [tensor.flatten()[:8] for tensor in one.values() if tensor.numel() > 8 and tensor.std() > 0]
    assert len({tuple(values.tolist()) for values in random}) == len(random) > 20  # no two alike


@pytest.mark.parametrize("assembly", ASSEMBLIES)
def test_norms_are_one_biases_and_gates_zero(assembly: str, layout: Groups) -> None:
    ones, zeros = 0, 0
    for name, tensor in drawn(assembly, layout).items():
        if re.search(r"norm\w*[._]weight$", name):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            ones += 1
        elif name.endswith(("bias", "_gate")):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
            zeros += 1
        else:
            assert tensor.std() > 0, name
    assert ones > 15 and zeros > 15


def test_spreads(layout: Groups) -> None:
    """The standard deviations of the docstring, on tensors large enough to measure them."""
    weights = drawn("cross_attention", layout)
    layer = "language.decoder.layers.1."
    std = 0.05
    expected = {
        "language.embedding.word_embeddings.weight": std,
        "language.output_layer.weight": std,
        f"{layer}self_attention.linear_qkv.weight": std,
        f"{layer}mlp.linear_fc1.weight": std,
        f"{layer}self_attention.linear_proj.weight": std / math.sqrt(8),
        f"{layer}mlp.linear_fc2.weight": std / math.sqrt(8),
        f"{layer}gated_cross_attention.attention.to_q.weight": 1 / math.sqrt(3 * 64),
        f"{layer}gated_cross_attention.feed_forward.linear_2.weight": 1 / math.sqrt(3 * 256),
        "vision.patch_embedding.weight": 0.02,
        "vision.blocks.0.attention.qkv.weight": 1 / math.sqrt(48),
        "vision.blocks.0.attention.proj.weight": 1 / math.sqrt(48 * 6),
        "vision.blocks.0.mlp.fc2.weight": 1 / math.sqrt(64 * 6),
        "connector.latents": 1.0,
        "connector.layers.0.attention.to_kv.weight": 1 / math.sqrt(3 * 48),
    }
    for name, wanted in expected.items():
        values = weights[name]
        tolerance = 5 / math.sqrt(2 * values.numel())  # five standard errors
        assert float(values.std()) == pytest.approx(wanted, rel=tolerance), name
        assert abs(float(values.mean())) < 5 * wanted / math.sqrt(values.numel()), name


def test_padding_of_the_vocabulary_is_zero_and_moves_nothing() -> None:
    recipe = tiny_recipe("merged")
    draw = weight_drawer(recipe.model, 3)
    vocab = recipe.model.language.vocab_size
    for name in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        plain, padded = draw(name, (vocab, 16)), draw(name, (vocab + 5, 16))
        assert torch.equal(padded[:vocab], plain) and plain.std() > 0
        assert torch.equal(padded[vocab:], torch.zeros(5, 16))


def test_an_unknown_parameter_is_an_error() -> None:
    draw = weight_drawer(tiny_recipe("merged").model, 1)
    with pytest.raises(KeyError, match=r"no rule for language\.decoder\.layers\.0\.novelty"):
        draw("language.decoder.layers.0.novelty", (3, 3))
