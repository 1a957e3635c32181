"""Projector, resampler and gated block against plain-torch reimplementations from the papers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megamm.config import Recipe
from megamm.engine.groups import Groups
from megamm.layers.cross_attention import GatedCrossAttention
from megamm.models.projector import MLPProjector
from megamm.models.resampler import PerceiverResampler
from tests.dist.tiny import tiny_recipe
from tests.one_process import build

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
    mask = torch.rand(2, 1, 7, 6) > 0.5
    mask[0, :, :3] = False  # positions that see nothing
    found = block(x, media, mask)
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
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    block(x, media, mask).sum().backward()
    assert media.grad is not None and media.grad.abs().max() == 0
    assert x.grad is not None and x.grad.isfinite().all()
    for name, parameter in block.named_parameters():
        if name.startswith("attention.") or name == "attention_gate":
            assert parameter.grad is not None and parameter.grad.abs().max() == 0, name
    mask[..., -1, 2] = True
    block(x, media, mask).sum().backward()
    assert media.grad[2].abs().max() > 0 and media.grad[[0, 1, 3, 4, 5]].abs().max() == 0
