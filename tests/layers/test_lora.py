"""Adapters: what they add, what is trained, what dropout leaves out, and the weights that they merge into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.convert.rules import InterleaveQKV
from megamm.engine.groups import Groups
from megamm.layers import decoder
from megamm.layers.lora import Adapters, _mixed, left_out, merged, position_keys
from megamm.models.freezing import part_of
from megamm.models.vlm import VisionLanguageModel
from tests.dist.tiny import LORA, tiny_batch, tiny_recipe
from tests.engine.test_frozen_is_free import CountProducts
from tests.one_process import build, whole

ALL = {**LORA, "model.lora.dropout": 0.0}
XCOMPOSER = {**ALL, "model.lora.targets": "[q, v, up, down]"}
LAYER = "language.decoder.layers.1."


def logits(model: VisionLanguageModel, recipe: Recipe, index: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny_batch(recipe, index), return_logits=True)


def without_adapters(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, lora=type(recipe.model.lora)()))


# --- what they add ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [ALL, XCOMPOSER, {**ALL, "model.language.out_bias": True}])
@pytest.mark.parametrize("kind", ["merged", "cross_attention"])
def test_merged_weights_give_the_same_logits(kind: str, overrides: dict[str, Any], layout: Groups) -> None:
    biases = {"model.language.qkv_bias": True} if "model.language.out_bias" in overrides else {}
    recipe = tiny_recipe(kind, {**overrides, **biases})
    model = build(recipe, layout)
    weights = whole(model)
    assert not any("gated" in name for name in weights if part_of(name) == "lora")
    own = {name: value for name, value in weights.items() if part_of(name) != "lora"}
    plain = without_adapters(recipe)
    into = {name: merged(name, weights.__getitem__, recipe.model) for name in own}
    wanted, got = logits(model, recipe), logits(build(plain, layout, into), plain)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert (logits(build(plain, layout, own), plain) - wanted).abs().max() > 0.1  # they do add something


def test_each_projection_gets_its_own_adapter(layout: Groups) -> None:
    """Compared with the projections as Hugging Face has them, taken apart by the tables of conversion."""
    recipe = tiny_recipe("merged", ALL)
    weights, m = whole(build(recipe, layout)), recipe.model.language
    heads = (m.num_heads, m.num_kv_heads or m.num_heads, m.head_dim)
    qkv = InterleaveQKV("", "q", "k", "v", *heads, (m.hidden_size,))
    apart: dict[str, Callable[[torch.Tensor], Any]] = {
        "self_attention.linear_qkv": qkv.to_theirs,
        "self_attention.linear_proj": lambda weight: [weight],
        "mlp.linear_fc1": lambda weight: weight.chunk(2),
        "mlp.linear_fc2": lambda weight: [weight],
    }
    targets = iter(["q", "k", "v", "o", "gate", "up", "down"])
    for linear, split in apart.items():
        name = f"{LAYER}{linear}.weight"
        result = merged(name, weights.__getitem__, recipe.model)
        assert result.dtype == weights[name].dtype and result.shape == weights[name].shape
        for before, after in zip(split(weights[name]), split(result), strict=True):
            adapter = f"{LAYER}{linear}.lora.{next(targets)}"
            added = weights[f"{adapter}.b"] @ weights[f"{adapter}.a"] * (6 / 4)
            torch.testing.assert_close(after, before + added, rtol=0, atol=1e-6)


def test_merging_sums_in_fp32_and_leaves_other_weights_alone() -> None:
    recipe = tiny_recipe("merged", {**ALL, "model.lora.targets": "[down]"})
    m, name = recipe.model.language, f"{LAYER}mlp.linear_fc2.weight"
    tensors = {
        name: torch.randn(m.hidden_size, m.ffn_hidden_size).bfloat16(),
        f"{LAYER}mlp.linear_fc2.lora.down.a": torch.randn(4, m.ffn_hidden_size).bfloat16(),
        f"{LAYER}mlp.linear_fc2.lora.down.b": torch.randn(m.hidden_size, 4).bfloat16(),
        f"{LAYER}mlp.linear_fc1.weight": torch.randn(3),
        "vision.blocks.0.mlp.fc1.weight": torch.randn(3),
    }
    weight, a, b, *_ = (tensor.double() for tensor in tensors.values())
    exact = (weight + b @ a * 1.5).to(torch.bfloat16)
    assert torch.equal(merged(name, tensors.__getitem__, recipe.model), exact)
    for other in list(tensors)[3:]:
        assert merged(other, tensors.__getitem__, recipe.model) is tensors[other]


def test_new_adapters_change_nothing(layout: Groups) -> None:
    """B starts at zero: bit for bit the model without them, which has the same other weights."""
    recipe = tiny_recipe("merged", ALL)
    model = build(recipe, layout)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) == "lora" and name.endswith(".b"):
                parameter.zero_()
    plain = without_adapters(recipe)
    assert torch.equal(logits(model, recipe), logits(build(plain, layout), plain))


def test_adapters_stand_behind_a_norm_of_their_own(layout: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend whose linears contain the norm gives them without it where adapters need what it gives."""

    class Fused(decoder.backend_by_name("local").__class__):  # type: ignore[misc]
        def fuse_layernorm_and_linear(self) -> bool:
            return True

        def column_parallel_layer_norm_linear(self) -> Any:
            raise AssertionError("asked for")

    monkeypatch.setattr(decoder, "backend_by_name", lambda name: Fused())
    recipe = tiny_recipe("merged", XCOMPOSER)
    assert whole(build(recipe, layout)).keys() > whole_names(layout, monkeypatch)
    with pytest.raises(AssertionError, match="asked for"):  # nothing of this linear has an adapter
        monkeypatch.setattr(decoder, "backend_by_name", lambda name: Fused())
        build(tiny_recipe("merged", {**ALL, "model.lora.targets": "[q]"}), layout)


def whole_names(layout: Groups, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.undo()
    return whole(build(tiny_recipe("merged"), layout)).keys()


# --- what is trained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["merged", "cross_attention"])
def test_only_adapters_are_trained(kind: str, layout: Groups) -> None:
    """With everything else frozen: no product gives the gradient of a frozen weight."""
    others = (
        "[vision, connector, language]"
        if kind == "merged"
        else "[vision, connector, language, cross_attention]"
    )
    recipe = tiny_recipe(kind, {**ALL, "training.freeze": others, "data.sequence_length": 25})
    model, batch = build(recipe, layout), tiny_batch(recipe, 0)
    frozen = {
        tuple(sorted(p.shape))
        for name, p in model.named_parameters()
        if p.ndim == 2 and part_of(name) == "language" and "embedding" not in name
    }
    with CountProducts() as forward:
        loss = model(batch).sum()
    with CountProducts() as backward:
        loss.backward()
    assert not frozen & set(forward.shapes), "an activation has the shape of a weight: choose other sizes"
    assert not frozen & set(backward.shapes)
    gradients = whole(model, lambda p: p.grad)
    assert {part_of(name) for name in gradients} == {"lora"} and len(gradients) == 4 * 7 * 2
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_adapters_are_a_part_of_their_own(layout: Groups) -> None:
    """They stay frozen in layers that are trained, and gated blocks as they are said to be."""
    freeze = {"training.freeze": "[language, lora]", "training.unfreeze.language": 2}
    trained = {
        part_of(name)
        for name, p in build(tiny_recipe("cross_attention", {**ALL, **freeze}), layout).named_parameters()
        if p.requires_grad
    }
    assert trained == {"vision", "connector", "language", "cross_attention"}


# --- dropout ------------------------------------------------------------------------------------------


def test_inputs_are_left_out_evenly_and_independently() -> None:
    positions, features = (_mixed(torch.arange(n)).to(torch.int32) for n in (2000, 3000))
    dropped = left_out(positions[:, None], features, 0.05)[:, 0]
    number = dropped.numel()
    assert float(dropped.float().mean()) == pytest.approx(0.05, abs=5 * (0.05 * 0.95 / number) ** 0.5)
    for dim, size in ((0, 2000), (1, 3000)):  # neither positions nor features are preferred
        share = dropped.float().mean(dim)
        assert float(share.std()) == pytest.approx((0.05 * 0.95 / size) ** 0.5, rel=0.1)
    # pairs, and the corners of rectangles, which a hash of sums would tie together
    half = left_out(positions[:, None], features, 0.5)[:, 0]
    corners = half[1:, 1:] ^ half[1:, :-1] ^ half[:-1, 1:] ^ half[:-1, :-1]
    for odd in (half[1:] ^ half[:-1], half[:, 1:] ^ half[:, :-1], corners):
        assert float(odd.float().mean()) == pytest.approx(0.5, abs=0.002)


def test_what_decides_the_positions_numbers() -> None:
    recipe = tiny_recipe("merged")
    batch, keys = tiny_batch(recipe, 1), position_keys(tiny_batch(recipe, 1), 7)
    assert keys.shape == batch.input_ids.shape and keys.unique().numel() == keys.numel()
    assert torch.equal(position_keys(tiny_batch(recipe, 1), 7), keys)
    for other in (position_keys(batch, 8), position_keys(replace(batch, step_start=8), 7)):
        assert not (other == keys).any()
    # a sample in a packed row has the numbers that it has alone, the padding others
    packed = tiny_batch(tiny_recipe("merged", {"data.pack": True}), 2)
    row, (first, second, third, padding) = position_keys(packed, 7)[0], packed.document_lengths()
    alone = Batch(
        **{**vars(batch), "sample_ids": packed.sample_ids[[2]], "position_ids": torch.arange(third)[None]}
    )
    assert torch.equal(position_keys(alone, 7)[0], row[first + second : -padding])
    assert row.unique().numel() == row.numel()


@torch.no_grad()
def test_dropout_keeps_the_mean_and_is_for_training_only(layout: Groups) -> None:
    recipe, dry = tiny_recipe("merged", LORA), tiny_recipe("merged", ALL)
    model, plain = build(recipe, layout), build(dry, layout)
    assert torch.equal(logits(model, recipe), logits(plain, dry))
    adapters = next(m for m in model.modules() if isinstance(m, Adapters) and m.linear == "linear_fc2")
    x, out = torch.ones(LENGTHS[0], LENGTHS[1], 96), torch.zeros(LENGTHS[0], LENGTHS[1], 64)
    wanted = adapters(x, out)
    batch = tiny_batch(recipe, 0)
    sums = torch.zeros_like(wanted)
    rounds = 400
    for start in range(rounds):
        model.language.train().begin(replace(batch, step_start=start))
        adapters.dropout_keys = model.language.decoder.layers[0].dropout_keys
        sums += adapters(x, out)
    spread = float((sums / rounds - wanted).std())
    a, b = adapters["down"].a, adapters["down"].b
    variance = 1.5**2 * float(((b[:, :, None] * a[None]).sum(1) ** 2).sum(1).mean()) * 0.25 / 0.75
    assert spread == pytest.approx((variance / rounds) ** 0.5, rel=0.2)


LENGTHS = (24, 2)  # positions and samples of a tiny batch


def gradients(model: VisionLanguageModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Two micro-batches forwards, then backwards, as in a pipeline."""
    losses = [model(replace(tiny_batch(recipe, index), step_start=index)).sum() for index in (0, 2)]
    for loss in losses:
        loss.backward()
    return whole(model, lambda p: p.grad)


@pytest.mark.parametrize("targets", ["[q, k, v, o, gate, up, down]", "[up, down]"])
@pytest.mark.parametrize(
    "recompute",
    [
        {"training.recompute.language": "full"},
        {"training.recompute.language": "selective", "training.recompute.modules": "[core_attn, mlp]"},
    ],
)
def test_recomputed_adapters_leave_out_the_same(
    recompute: dict[str, Any], targets: str, layout: Groups
) -> None:
    settings = {**LORA, "model.lora.targets": targets, "training.freeze": "[vision, connector, language]"}
    kept, recipe = tiny_recipe("merged", settings), tiny_recipe("merged", {**settings, **recompute})
    want, got = gradients(build(kept, layout), kept), gradients(build(recipe, layout), recipe)
    assert got.keys() == want.keys() and len(want) in (4 * 7 * 2, 4 * 2 * 2)
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient) and gradient.abs().max() > 0, name
    dry = tiny_recipe("merged", {**settings, "model.lora.dropout": 0.0})
    assert not torch.equal(gradients(build(dry, layout), dry)[name], gradient)


def test_layers_and_linears_leave_out_different_inputs(layout: Groups) -> None:
    model = build(recipe := tiny_recipe("merged", LORA), layout)
    model(tiny_batch(recipe, 0))
    found: list[nn.Module] = [m for m in model.modules() if isinstance(m, Adapters) and m.in_size == 64]
    masks = {tuple(m._left_out(torch.device("cpu")).flatten().tolist()) for m in found}
    assert len(masks) == len(found) == 4 * 3
