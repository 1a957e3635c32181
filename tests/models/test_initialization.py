"""Random weights: one rule for every parameter, the same for every layout."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from megamm.engine.groups import Groups
from megamm.engine.weights import initialize
from megamm.models.initialization import initialization_table, weight_drawer
from megamm.models.vlm import build_model
from tests.dist.tiny import IMAGE_ID, KINDS, tiny_recipe
from tests.one_process import whole

ADAPTERS = {"lora__rank": 32, "lora__targets": "[q, down]"}


def drawn(kind: str, layout: Groups, seed: int = 1, **overrides: Any) -> dict[str, torch.Tensor]:
    """All weights of a model that was full of NaN before; `overrides` are keys of its "model" section."""
    changes = {f"model.{key.replace('__', '.')}": value for key, value in overrides.items()}
    recipe = tiny_recipe(kind, {"seed": seed} | changes)
    models = build_model(recipe, layout, "local", IMAGE_ID)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.fill_(float("nan"))
    initialize(models, weight_drawer(recipe.model, recipe.seed))
    assert all(parameter.isfinite().all() for parameter in models[0].parameters())
    return whole(models[0])


def test_every_parameter_has_a_rule_and_every_rule_a_parameter(layout: Groups) -> None:
    recipe = tiny_recipe("cross_attention")
    names = {name for kind in KINDS for name in drawn(kind, layout)}
    names |= drawn("merged", layout, **ADAPTERS).keys()
    assert len(names) > 150
    patterns = [pattern for pattern, _ in initialization_table(recipe.model)]
    first = {name: next(p for p in patterns if re.fullmatch(p, name)) for name in names}
    assert set(first.values()) == set(patterns)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_all_weights(kind: str, layout: Groups) -> None:
    one, again, other = (drawn(kind, layout, seed) for seed in (1, 1, 2))
    assert sorted(one) == sorted(again) == sorted(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name]), name
        constant = bool((tensor == tensor.flatten()[0]).all())
        assert torch.equal(tensor, other[name]) == constant, name
    random = [tensor.flatten()[:8] for tensor in one.values() if tensor.numel() > 8 and tensor.std() > 0]
    assert len({tuple(values.tolist()) for values in random}) == len(random) > 20  # no two alike


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_one_biases_and_gates_zero(kind: str, layout: Groups) -> None:
    ones, zeros = 0, 0
    for name, tensor in drawn(kind, layout).items():
        if re.search(r"norm\w*[._]weight$", name):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
            ones += 1
        elif name.endswith(("bias", "_gate")):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
            zeros += 1
        else:
            assert tensor.std() > 0, name
    assert ones > 15 and zeros > 15


def has_spread(values: torch.Tensor, std: float, name: str) -> None:
    """Mean zero and this standard deviation, both within five standard errors."""
    number = values.numel()
    assert float(values.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * number)), name
    assert abs(float(values.mean())) < 5 * std / math.sqrt(number), name


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
        f"{layer}gated_cross_attention.attention.to_q.weight": 1 / math.sqrt(64),
        f"{layer}gated_cross_attention.attention.to_out.weight": 1 / math.sqrt(32),
        f"{layer}gated_cross_attention.feed_forward.linear_2.weight": 1 / math.sqrt(256),
        "vision.patch_embedding.weight": 1 / math.sqrt(3 * 8 * 8),
        "vision.position_embedding": 0.02,
        "vision.class_embedding": 0.02,
        "vision.blocks.0.attention.qkv.weight": 1 / math.sqrt(48),
        "vision.blocks.0.attention.proj.weight": 1 / math.sqrt(48 * 6),
        "vision.blocks.0.mlp.fc2.weight": 1 / math.sqrt(64 * 6),
        "connector.latents": 1.0,
        "connector.layers.0.attention.to_kv.weight": 1 / math.sqrt(48),
        "connector.layers.1.feed_forward.linear_2.weight": 1 / math.sqrt(4 * 48),
    }
    for name, wanted in expected.items():
        has_spread(weights[name], wanted, name)


def test_spreads_of_the_projector(layout: Groups) -> None:
    weights = drawn("merged", layout)
    has_spread(weights["connector.linear_1.weight"], 1 / math.sqrt(48), "linear_1")
    has_spread(weights["connector.linear_2.weight"], 1 / math.sqrt(64), "linear_2")


def test_spreads_of_the_qformer(layout: Groups) -> None:
    weights = drawn("qformer", layout, connector__latent_std=0.02)
    expected = {
        "queries": 0.02,
        "flag_start": 0.05,  # as token embeddings
        "flag_end": 0.05,
        "layers.0.cross_attention.to_kv.weight": 1 / math.sqrt(48),
        "layers.1.self_attention.to_out.weight": 1 / math.sqrt(32),
        "layers.2.feed_forward.linear_2.weight": 1 / math.sqrt(128),
        "proj.weight": 1 / math.sqrt(32),
    }
    for name, wanted in expected.items():
        has_spread(weights[f"connector.{name}"], wanted, name)


def test_spreads_of_adapters(layout: Groups) -> None:
    weights, layer = drawn("merged", layout, **ADAPTERS), "language.decoder.layers.2."
    for linear, width in (("self_attention.linear_qkv.lora.q", 64), ("mlp.linear_fc2.lora.down", 96)):
        has_spread(weights[f"{layer}{linear}.a"], 1 / math.sqrt(3 * width), linear)
        assert torch.equal(weights[f"{layer}{linear}.b"], torch.zeros(64, 32))


def test_spreads_of_idefics(layout: Groups) -> None:
    weights, block = drawn("idefics", layout), "language.decoder.layers.2.gated_cross_attention."
    has_spread(weights[f"{block}feed_forward.linear_fc1.weight"], 1 / math.sqrt(64), "linear_fc1")
    has_spread(weights[f"{block}feed_forward.linear_fc2.weight"], 1 / math.sqrt(96), "linear_fc2")


@pytest.mark.parametrize(
    ("key", "value", "pattern", "number"),
    [
        ("cross_attention__gate_init", 0.7, r"language\..*_gate", 4),  # two gates of two blocks
        ("connector__latent_std", 0.3, r"connector\.latents", 1),
        ("vision__init_std", 0.6, r"vision\.(class|position)_embedding", 2),
    ],
)
def test_a_key_sets_its_parameters_and_no_others(
    key: str, value: float, pattern: str, number: int, layout: Groups
) -> None:
    """Where the spread is set, the same draws are scaled."""
    before, after = drawn("cross_attention", layout), drawn("cross_attention", layout, **{key: value})
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if re.fullmatch(pattern, name)}
    assert len(changed) == number
    for name in changed:
        if name.endswith("_gate"):
            assert torch.equal(after[name], torch.full_like(after[name], value)), name
        else:
            has_spread(after[name], value, name)


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
