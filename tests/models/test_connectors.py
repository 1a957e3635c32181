"""Projector, resampler and gated block against plain-torch reimplementations from the papers; sizes and
names of the Q-Former and of IDEFICS' geometry (whose parity with transformers is tests/parity's)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megamm.config import ConnectorConfig, CrossAttentionConfig, Recipe
from megamm.engine.groups import Groups
from megamm.engine.transformer_config import decoder_config
from megamm.layers.backend import backend_by_name
from megamm.layers.cross_attention import GatedCrossAttention, MediaMask
from megamm.models.projector import MLPProjector
from megamm.models.qformer import QFormer
from megamm.models.resampler import PerceiverResampler
from tests.dist.tiny import tiny_recipe
from tests.one_process import build, whole
from tests.segments import dense_mask, segments

NUM_HEADS, HEAD_DIM = 4, 8
NUM_IMAGES, NUM_FEATURES, WIDTH, HIDDEN = 3, 5, 48, 64


@pytest.fixture
def recipe() -> Recipe:
    return tiny_recipe("cross_attention")


def scramble(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random weights everywhere, norms and gates included; returns them in double precision."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return {name: value.double() for name, value in module.state_dict().items() if value is not None}


def norm(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attention(
    query: torch.Tensor,
    context: torch.Tensor,
    weights: dict[str, torch.Tensor],
    name: str,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """One head after the other over [positions, width] of one sample; nothing allowed gives zero."""
    q = query @ weights[f"{name}.to_q.weight"].T
    kv = context @ weights[f"{name}.to_kv.weight"].T
    heads = []
    for head in range(NUM_HEADS):
        q_h = q[:, head * HEAD_DIM : (head + 1) * HEAD_DIM]
        k_h, v_h = kv[:, head * 2 * HEAD_DIM : (head + 1) * 2 * HEAD_DIM].split(HEAD_DIM, dim=1)
        scores = (q_h @ k_h.T / math.sqrt(HEAD_DIM)).exp()
        if allowed is not None:
            scores = scores * allowed
        heads.append(scores @ v_h / scores.sum(-1, keepdim=True).clamp(min=1e-300))
    return torch.cat(heads, dim=1) @ weights[f"{name}.to_out.weight"].T


def feed_forward(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    inner = F.gelu(norm(x, weights, f"{name}_norm") @ weights[f"{name}.linear_1.weight"].T)
    return inner @ weights[f"{name}.linear_2.weight"].T


def test_projector() -> None:
    projector = MLPProjector(WIDTH, HIDDEN)
    w = scramble(projector)
    features = torch.randn(2, NUM_FEATURES, WIDTH)
    inner = features.double() @ w["linear_1.weight"].T + w["linear_1.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # GELU, not its tanh approximation
    wanted = inner @ w["linear_2.weight"].T + w["linear_2.bias"]
    torch.testing.assert_close(projector(features).double(), wanted, atol=1e-5, rtol=1e-5)


def resample(features: torch.Tensor, weights: dict[str, torch.Tensor], depth: int) -> torch.Tensor:
    """[P, W] features of one image to [L, W]: the latents read [features, latents], layer after layer."""
    latents = weights["latents"]
    for layer in range(depth):
        name = f"layers.{layer}"
        media, queries = (
            norm(features, weights, f"{name}.norm_media"),
            norm(latents, weights, f"{name}.norm_latents"),
        )
        latents = latents + attention(queries, torch.cat([media, queries]), weights, f"{name}.attention")
        latents = latents + feed_forward(latents, weights, f"{name}.feed_forward")
    return norm(latents, weights, "norm")


def test_resampler(recipe: Recipe, layout: Groups) -> None:
    resampler = build(recipe, layout).connector
    assert isinstance(resampler, PerceiverResampler)
    weights = scramble(resampler)
    features = torch.randn(NUM_IMAGES, NUM_FEATURES, WIDTH)
    found = resampler(features)
    wanted = torch.stack([resample(image.double(), weights, 2) for image in features])
    assert found.shape == (NUM_IMAGES, 4, WIDTH)
    torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=2e-5)


def gated_block(recipe: Recipe, layout: Groups) -> GatedCrossAttention:
    block = build(recipe, layout).language.decoder.layers[1].gated_cross_attention
    assert isinstance(block, GatedCrossAttention)
    return block


def test_gated_block(recipe: Recipe, layout: Groups) -> None:
    block = gated_block(recipe, layout)
    weights = scramble(block)
    x, media = torch.randn(7, 2, HIDDEN), torch.randn(6, 2, WIDTH)
    seen = segments([[0, 0, 0, 1, 1, 3, 3], [1, 1, 2, 0, 0, 3, 0]], num_images=3, num_latents=2)
    mask = dense_mask(seen)
    found = block(x, media, MediaMask(seen))
    wanted = []
    for sample in range(2):
        rows, allowed = x[:, sample].double(), mask[sample, 0].double()
        queries = norm(rows, weights, "attention_norm")
        attended = attention(queries, media[:, sample].double(), weights, "attention", allowed)
        rows = rows + weights["attention_gate"].tanh() * attended
        wanted.append(
            rows + weights["feed_forward_gate"].tanh() * feed_forward(rows, weights, "feed_forward")
        )
    torch.testing.assert_close(found.double(), torch.stack(wanted, dim=1), atol=2e-5, rtol=2e-5)


def test_blocks_stand_before_every_nth_layer(recipe: Recipe, layout: Groups) -> None:
    layers = build(recipe, layout).language.decoder.layers
    assert [layer.gated_cross_attention is not None for layer in layers] == [False, True, False, True]


def test_gradients_of_a_position_without_media_are_finite(recipe: Recipe, layout: Groups) -> None:
    """Softmax over nothing is NaN; such a position must send back nothing instead."""
    block = gated_block(recipe, layout)
    scramble(block)
    x = torch.randn(4, 1, HIDDEN, requires_grad=True)
    media = torch.randn(6, 1, WIDTH, requires_grad=True)
    block(x, media, MediaMask(segments([[0, 0, 0, 0]], 6, 1))).sum().backward()
    assert media.grad is not None and media.grad.abs().max() == 0
    assert x.grad is not None and x.grad.isfinite().all()
    for name, parameter in block.named_parameters():
        if name.startswith("attention.") or name == "attention_gate":
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name
    block(x, media, MediaMask(segments([[0, 0, 0, 3]], 6, 1))).sum().backward()
    assert media.grad[2].abs().max() > 0 and media.grad[[0, 1, 3, 4, 5]].abs().max() == 0


# --- InfiMM: samples without images pass the blocks unchanged -----------------------------------------


def skipping_recipe() -> Recipe:
    return tiny_recipe("cross_attention", {"model.cross_attention.skip_text_only": True})


def test_text_only_samples_skip_the_block(recipe: Recipe, layout: Groups) -> None:
    """Bit for bit, and without a gradient to the block; samples with an image are as before."""
    plain = gated_block(recipe, layout)
    skipping = gated_block(skipping_recipe(), layout)
    x, media = torch.randn(4, 3, HIDDEN), torch.randn(6, 3, WIDTH)
    # in every position; no image at all; none before position 2
    seen = segments([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]], 1, 6)
    without, found = plain(x, media, MediaMask(seen)), skipping(x, media, MediaMask(seen))
    assert torch.equal(found[:, 1], x[:, 1]) and not torch.equal(without[:, 1], x[:, 1])
    assert torch.equal(found[:, [0, 2]], without[:, [0, 2]])
    found[:, 1].sum().backward()
    for name, parameter in skipping.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() == 0, name


def test_the_caller_can_say_which_positions_skip_the_block(layout: Groups) -> None:
    """Of a packed row, the documents without images."""
    block = gated_block(skipping_recipe(), layout)
    x, media = torch.randn(4, 1, HIDDEN), torch.randn(6, 1, WIDTH)
    seen = segments([[0, 1, 0, 0]], 1, 6)
    keep = torch.tensor([True, True, False, False])[:, None, None]
    found, everywhere = block(x, media, MediaMask(seen, keep)), block(x, media, MediaMask(seen))
    assert torch.equal(found[2:], x[2:]) and torch.equal(found[:2], everywhere[:2])
    assert not torch.equal(everywhere[2:], x[2:])


# --- names and sizes ----------------------------------------------------------------------------------


def attention_shapes(width: int, context: int, inner: int) -> dict[str, tuple[int, ...]]:
    weights = {"to_q": (inner, width), "to_kv": (2 * inner, context), "to_out": (width, inner)}
    return {f"{name}.weight": shape for name, shape in weights.items()}


def test_names_and_shapes_of_the_qformer(layout: Groups) -> None:
    """The names in checkpoints are a format: changing one breaks everybody's files."""
    expected: dict[str, tuple[int, ...]] = {
        "queries": (4, 32),
        "proj.weight": (HIDDEN, 32),
        "proj.bias": (HIDDEN,),
        "flag_start": (HIDDEN,),
        "flag_end": (HIDDEN,),
    }
    norms = {"norm_vision": WIDTH, "norm_queries": 32}
    for n in range(3):
        linears = {"feed_forward.linear_1.weight": (128, 32), "feed_forward.linear_2.weight": (32, 128)}
        for part, context in (("self", 32), ("cross", WIDTH))[: 1 if n == 1 else 2]:
            shapes = attention_shapes(32, context, 32)
            linears |= {f"{part}_attention.{name}": shape for name, shape in shapes.items()}
            norms[f"layers.{n}.{part}_attention_norm"] = 32
        norms[f"layers.{n}.feed_forward_norm"] = 32
        biases = {name.replace("weight", "bias"): shape[:1] for name, shape in linears.items()}
        expected |= {f"layers.{n}.{name}": shape for name, shape in (linears | biases).items()}
    expected |= {f"{name}.{kind}": (size,) for name, size in norms.items() for kind in ("weight", "bias")}
    tensors = whole(build(tiny_recipe("qformer"), layout))
    found = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("connector.")}
    assert found == {f"connector.{name}": shape for name, shape in expected.items()}


def test_names_and_shapes_of_idefics(layout: Groups) -> None:
    tensors = whole(build(tiny_recipe("idefics"), layout))
    block = {
        "attention_norm.weight": (HIDDEN,),
        **{f"attention.{name}": shape for name, shape in attention_shapes(HIDDEN, WIDTH, HIDDEN).items()},
        "attention.q_layernorm.weight": (16,),
        "attention.k_layernorm.weight": (16,),
        "feed_forward_norm.weight": (HIDDEN,),
        "feed_forward.linear_fc1.weight": (2 * 96, HIDDEN),
        "feed_forward.linear_fc2.weight": (HIDDEN, 96),
        "attention_gate": (HIDDEN,),
        "feed_forward_gate": (HIDDEN,),
    }
    prefix = "language.decoder.layers.{}.gated_cross_attention.{}"
    found = {name: tuple(t.shape) for name, t in tensors.items() if ".gated_cross_attention." in name}
    assert found == {prefix.format(n, name): shape for n in (0, 2) for name, shape in block.items()}
    norms = {name: tuple(t.shape) for name, t in tensors.items() if re.match(r"connector.*_layernorm", name)}
    assert len(norms) == 2 * 4 and set(norms.values()) == {(HEAD_DIM,)}


def size(build_on_meta: Callable[[], torch.nn.Module]) -> tuple[int, int]:
    """Parameters in all, and those trained."""
    with torch.device("meta"):
        parameters = list(build_on_meta().parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize(("vision_width", "bert"), [(1024, 101_598_720), (1408, 105_137_664)])
@pytest.mark.parametrize("num_queries", [32, 64])
def test_published_size_of_the_qformer(
    vision_width: int, bert: int, num_queries: int, recipe: Recipe, layout: Groups
) -> None:
    """Of BERT base with cross-attention in every other layer; queries, norm of the features, and linear
    into InternLM-7B around it."""
    connector = ConnectorConfig(
        "qformer", num_latents=num_queries, depth=12, num_heads=12, head_dim=64, flag_embeddings=True
    )
    config, tp_group = decoder_config(recipe), layout.collection.tp
    total, trained = size(lambda: QFormer(config, connector, vision_width, 4096, "local", tp_group))
    assert trained == bert + num_queries * 768 + 2 * vision_width + 3_149_824
    assert total == trained + 2 * 4096


def test_published_size_of_idefics_block(layout: Groups) -> None:
    """Of LLaMA-65B on features of ViT-bigG/14."""
    sizes = {"num_heads": 64, "num_kv_heads": 64, "hidden_size": 8192, "ffn_hidden_size": 22016}
    recipe = tiny_recipe("idefics", {f"model.language.{key}": value for key, value in sizes.items()})
    config, backend = decoder_config(recipe), backend_by_name("local")
    geometry, group = CrossAttentionConfig(geometry="idefics"), layout.collection.tp
    total, _ = size(lambda: GatedCrossAttention(config, backend, geometry, 1664, group))
    assert total == 702_562_306


@pytest.mark.parametrize("section", ["connector", "cross_attention"])
def test_either_norm_of_heads_has_its_gradients_summed(section: str) -> None:
    """What tests/dist/test_traps.py shows to be needed, where only one part of the model has such norms."""
    other = {"connector": "cross_attention", "cross_attention": "connector"}[section]
    recipe = tiny_recipe("idefics", {f"model.{other}.qk_norm": False})
    assert decoder_config(recipe).qk_layernorm
    assert not decoder_config(tiny_recipe("cross_attention")).qk_layernorm
