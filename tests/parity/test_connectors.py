"""Q-Former, IDEFICS' resampler and its gated block against transformers: outputs and every gradient, fp32.

The weights are copied here, by tables of their own; what converters do is tested elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from megamm.engine.groups import Groups
from megamm.layers.cross_attention import MediaMask
from tests.dist.tiny import tiny_recipe
from tests.one_process import build
from tests.segments import dense_mask, segments

TOLERANCE = 1e-5  # of the largest element of a tensor
NUM_HEADS, WIDTH, HIDDEN = 4, 48, 64  # of the tiny models
NUM_IMAGES, NUM_FEATURES = 3, 5

Weights = dict[str, torch.Tensor]
Table = Callable[[Weights], Iterator[tuple[str, torch.Tensor]]]  # theirs -> (our name, tensor)


def scramble(module: nn.Module) -> None:
    """Random weights everywhere, gates included; those of norms around 1, so that no gradient vanishes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            is_norm = re.search(r"(norm|LayerNorm|ln|ln_vision)\.weight$", name)
            parameter.normal_(mean=1.0 if is_norm else 0.0, std=0.3)


def by_head(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Rows of keys and values, head by head."""
    pair = [x.unflatten(0, (NUM_HEADS, -1)) for x in (keys, values)]
    return torch.cat(pair, dim=1).flatten(0, 1)


def copy_weights(ours: nn.Module, theirs: nn.Module, table: Table) -> None:
    weights = dict(table(dict(theirs.named_parameters())))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights.pop(name))
    assert not weights


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    assert found.shape == wanted.shape, name
    if name.endswith("k_layernorm.bias"):  # zero but for rounding: it changes no softmax
        assert max(found.abs().max(), wanted.abs().max()) < 1e-5, name
        return
    assert wanted.abs().max() > 1e-6, name
    difference = (found - wanted).abs().max() / wanted.abs().max()
    assert difference <= TOLERANCE, f"{name} differs by {difference:.1e}"


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, table: Table) -> None:
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    wanted = dict(table(gradients))
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == wanted.keys() and len(wanted) >= 9
    for name, gradient in trained.items():
        assert gradient is not None, name
        assert_equal(gradient, wanted[name], name)


def compare(
    ours: nn.Module,
    theirs: nn.Module,
    table: Table,
    run_ours: Callable[..., torch.Tensor],
    run_theirs: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
) -> None:
    """Both on the same inputs, batch first: outputs, gradients of the inputs and of all weights."""
    scramble(theirs)
    copy_weights(ours, theirs, table)
    outputs, input_gradients = [], []
    for run in (run_ours, run_theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs.append(run(*leaves))
        generator = torch.Generator().manual_seed(0)
        (outputs[-1] * torch.randn(outputs[-1].shape, generator=generator)).sum().backward()
        input_gradients.append([x.grad for x in leaves])
    assert_equal(*outputs, "output")
    for number, (found, wanted) in enumerate(zip(*input_gradients, strict=True)):
        assert_equal(found, wanted, f"input {number}")
    assert_same_gradients(ours, theirs, table)


# --- Q-Former -----------------------------------------------------------------------------------------


class Blip2Connector(nn.Module):
    """BLIP-2's modules between its vision encoder and its language model."""

    def __init__(self, cross_every: int) -> None:
        super().__init__()
        config = Blip2QFormerConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=NUM_HEADS,
            intermediate_size=4 * 32,
            encoder_hidden_size=WIDTH,
            cross_attention_frequency=cross_every,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        assert config.layer_norm_eps == 1e-12 and config.hidden_act == "gelu"
        self.ln_vision = nn.LayerNorm(WIDTH)
        self.query_tokens = nn.Parameter(torch.empty(1, 4, 32))
        self.qformer = Blip2QFormerModel(config)
        self.proj = nn.Linear(32, HIDDEN)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        queries = self.query_tokens.expand(len(features), -1, -1)
        seen = self.qformer(query_embeds=queries, encoder_hidden_states=self.ln_vision(features))
        return self.proj(seen.last_hidden_state)


def qformer_table(theirs: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "queries", theirs["query_tokens"][0]
    for kind in ("weight", "bias"):
        yield f"norm_vision.{kind}", theirs[f"ln_vision.{kind}"]
        yield f"norm_queries.{kind}", theirs[f"qformer.layernorm.{kind}"]
        yield f"proj.{kind}", theirs[f"proj.{kind}"]
        for layer in range(3):
            hf, own = f"qformer.encoder.layer.{layer}", f"layers.{layer}"
            for hf_part, part in (("attention", "self_attention"), ("crossattention", "cross_attention")):
                source = f"{hf}.{hf_part}"
                if f"{source}.attention.key.{kind}" not in theirs:
                    continue
                key, value = (theirs[f"{source}.attention.{x}.{kind}"] for x in ("key", "value"))
                yield f"{own}.{part}.to_q.{kind}", theirs[f"{source}.attention.query.{kind}"]
                yield f"{own}.{part}.to_kv.{kind}", by_head(key, value)
                yield f"{own}.{part}.to_out.{kind}", theirs[f"{source}.output.dense.{kind}"]
                yield f"{own}.{part}_norm.{kind}", theirs[f"{source}.output.LayerNorm.{kind}"]
            yield f"{own}.feed_forward.linear_1.{kind}", theirs[f"{hf}.intermediate_query.dense.{kind}"]
            yield f"{own}.feed_forward.linear_2.{kind}", theirs[f"{hf}.output_query.dense.{kind}"]
            yield f"{own}.feed_forward_norm.{kind}", theirs[f"{hf}.output_query.LayerNorm.{kind}"]


@pytest.mark.parametrize("cross_every", [1, 2, 3])
@pytest.mark.parametrize("flags", [False, True])
def test_qformer(cross_every: int, flags: bool, layout: Groups) -> None:
    settings = {"connector.cross_every": cross_every, "connector.flag_embeddings": flags}
    recipe = tiny_recipe("qformer", {f"model.{key}": value for key, value in settings.items()})
    ours, theirs = build(recipe, layout).connector, Blip2Connector(cross_every)

    def run(features: torch.Tensor) -> torch.Tensor:
        out = ours(features)
        assert out.shape == (NUM_IMAGES, recipe.model.tokens_per_image, HIDDEN)
        if flags:
            assert (out[:, 0] == ours.flag_start).all() and (out[:, -1] == ours.flag_end).all()
            assert not torch.equal(ours.flag_start, ours.flag_end)
        return out[:, 1:-1] if flags else out

    compare(ours, theirs, qformer_table, run, theirs, [torch.randn(NUM_IMAGES, NUM_FEATURES, WIDTH)])
    assert [name for name, p in ours.named_parameters() if not p.requires_grad] == (
        ["flag_start", "flag_end"] if flags else []
    )


# --- IDEFICS ------------------------------------------------------------------------------------------


def idefics(qk_norm: bool, vector_gates: bool = False) -> Any:
    config = IdeficsConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_attention_heads=NUM_HEADS,
        rms_norm_eps=1e-3,
        qk_layer_norms=qk_norm,
        alpha_type="vector" if vector_gates else "float",
        vision_config={"embed_dim": WIDTH},
        perceiver_config={"qk_layer_norms_perceiver": qk_norm},
        attn_implementation="eager",
    )
    assert config.dropout == 0.0 and config.hidden_act == "silu"
    return config


def resampler_table(theirs: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "latents", theirs["latents"]
    names = {
        "0.context_layer_norm": "norm_media",
        "0.latents_layer_norm": "norm_latents",
        "0.q_layer_norm": "attention.q_layernorm",
        "0.k_layer_norm": "attention.k_layernorm",
        "0.q_proj": "attention.to_q",
        "0.output_proj": "attention.to_out",
        "1.ln": "feed_forward_norm",
        "1.fc": "feed_forward.linear_1",
        "1.c_proj": "feed_forward.linear_2",
    }
    for kind in ("weight", "bias"):
        yield f"norm.{kind}", theirs[f"layer_norm.{kind}"]
        for layer in range(2):
            for hf, own in names.items():
                if (name := f"blocks.{layer}.{hf}.{kind}") in theirs:
                    yield f"layers.{layer}.{own}.{kind}", theirs[name]
    for layer in range(2):
        keys, values = (theirs[f"blocks.{layer}.0.{x}_proj.weight"] for x in "kv")
        yield f"layers.{layer}.attention.to_kv.weight", by_head(keys, values)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_resampler(qk_norm: bool, layout: Groups) -> None:
    ours = build(tiny_recipe("idefics", {"model.connector.qk_norm": qk_norm}), layout).connector
    theirs = IdeficsPerceiverResampler(idefics(qk_norm), WIDTH, 2, NUM_HEADS, 8, 4)
    compare(ours, theirs, resampler_table, ours, theirs, [torch.randn(NUM_IMAGES, NUM_FEATURES, WIDTH)])


def gated_block_table(theirs: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    yield "attention_gate", theirs["alpha_cross_attn"].flatten()
    yield "feed_forward_gate", theirs["alpha_dense"].flatten()
    names = {
        "input_layernorm": "attention_norm",
        "cross_attn.q_proj": "attention.to_q",
        "cross_attn.o_proj": "attention.to_out",
        "cross_attn.q_layer_norm": "attention.q_layernorm",
        "cross_attn.k_layer_norm": "attention.k_layernorm",
        "post_attention_layernorm": "feed_forward_norm",
        "mlp.down_proj": "feed_forward.linear_fc2",
    }
    for hf, own in names.items():
        if (name := f"{hf}.weight") in theirs:
            yield f"{own}.weight", theirs[name]
    keys, values = (theirs[f"cross_attn.{x}_proj.weight"] for x in "kv")
    yield "attention.to_kv.weight", by_head(keys, values)
    gate_and_up = [theirs[f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
    yield "feed_forward.linear_fc1.weight", torch.cat(gate_and_up)


@pytest.mark.parametrize(("qk_norm", "vector_gates"), [(False, False), (True, True)])
def test_gated_block(qk_norm: bool, vector_gates: bool, layout: Groups) -> None:
    settings = {"qk_norm": qk_norm, "vector_gates": vector_gates}
    overrides = {f"model.cross_attention.{key}": value for key, value in settings.items()}
    recipe = tiny_recipe("idefics", {**overrides, "model.language.norm_eps": 1e-3})
    ours = build(recipe, layout).language.decoder.layers[2].gated_cross_attention
    theirs = IdeficsGatedCrossAttentionLayer(idefics(qk_norm, vector_gates), layer_idx=0)
    seen = segments([[0, 0, 0, 1, 1, 3, 3], [1, 2, 2, 2, 3, 3, 3]], num_images=3, num_latents=2)
    mask = dense_mask(seen)  # of three positions that see no image

    def run_ours(x: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        return ours(x.transpose(0, 1), media.transpose(0, 1), MediaMask(seen)).transpose(0, 1)

    def run_theirs(x: torch.Tensor, media: torch.Tensor) -> torch.Tensor:
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return theirs(
            x,
            image_hidden_states=media,
            image_attention_mask=additive,
            cross_attention_gate=mask[:, 0].any(-1).float(),
        )

    inputs = [torch.randn(2, 7, HIDDEN), torch.randn(2, 6, WIDTH)]
    compare(ours, theirs, gated_block_table, run_ours, run_theirs, inputs)


def test_blocks_stand_where_idefics_has_them(layout: Groups) -> None:
    layers = build(tiny_recipe("idefics"), layout).language.decoder.layers
    assert [layer.gated_cross_attention is not None for layer in layers] == [True, False, True, False]
