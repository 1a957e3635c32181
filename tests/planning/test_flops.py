"""FLOPs against torch's own counter, run on plain modules and on transformers' LLaMA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megamm.config import Recipe
from megamm.models.projector import MLPProjector
from megamm.models.vision.vit import VisionTransformer
from megamm.planning.flops import flops_by_part, flops_per_step
from megamm.planning.hardware import gpu_by_name, gpu_names, peak_flops
from megamm.recipe import recipe_from_dict

LENGTH = 32
# No two widths alike, so that a swapped one shows.
LANGUAGE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 344,
    "vocab_size": 512,
}
VISION: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "width": 96,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_width": 320,
}


def recipe(*overrides: str, language: dict[str, Any] = LANGUAGE) -> Recipe:
    raw: dict[str, Any] = {
        "name": "flops",
        "run_dir": "r",
        "tokenizer": "t",
        "model": {"language": language, "vision": VISION},
        "data": {"sequence_length": LENGTH},
    }
    return recipe_from_dict(raw, overrides=overrides)


def counted(forward: Any) -> float:
    """What torch counts in a forward pass, and in its backward pass if anything needs gradients."""
    with FlopCounterMode(display=False) as counter:
        out = forward()
        if out.requires_grad:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("trained", [True, False])
def test_vision(trained: bool, feature_layer: int, activation: str) -> None:
    vision = {"feature_layer": feature_layer, "activation": activation}
    freeze = "[]" if trained else "[vision]"
    r = recipe(f"training.freeze={freeze}", *(f"model.vision.{key}={value}" for key, value in vision.items()))
    tower = VisionTransformer(r.model.vision).requires_grad_(trained)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    images = torch.randn(3, 3, VISION["image_size"], VISION["image_size"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert flops_by_part(r, LENGTH, 3)["vision"] == counted(lambda: tower(images))


@pytest.mark.parametrize("first", [0, 1])
def test_vision_trained_from_a_block_on(first: int) -> None:
    r = recipe("training.freeze=[vision]", f"training.unfreeze.vision={first}")
    tower = VisionTransformer(r.model.vision).requires_grad_(False)
    tower.blocks[first:].requires_grad_(True)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    images = torch.randn(3, 3, VISION["image_size"], VISION["image_size"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert flops_by_part(r, LENGTH, 3)["vision"] == counted(lambda: tower(images))


@pytest.mark.parametrize("freeze", [[], ["vision"], ["connector"], ["vision", "connector"]])
def test_projector(freeze: list[str]) -> None:
    r = recipe(f"training.freeze={freeze}")
    vision = r.model.vision
    projector = MLPProjector(vision.width, r.model.language.hidden_size)
    projector.requires_grad_("connector" not in freeze)
    features = torch.randn(5, vision.num_features, vision.width, requires_grad="vision" not in freeze)
    assert flops_by_part(r, LENGTH, 5)["connector"] == counted(lambda: projector(features))


@pytest.mark.parametrize(
    ("freeze", "crossed"), [([], True), (["language"], True), (["language", "vision"], True)]
)
def test_merged_language_model(freeze: list[str], crossed: bool) -> None:
    """transformers computes the whole square of scores; the definition counts half of it."""
    transformers = pytest.importorskip("transformers")
    r = recipe(f"training.freeze={freeze}")
    m = r.model.language
    config = transformers.LlamaConfig(
        hidden_size=m.hidden_size,
        intermediate_size=m.ffn_hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        vocab_size=m.vocab_size,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_("language" not in freeze)
    embeddings = torch.randn(2, LENGTH, m.hidden_size, requires_grad=True)
    measured = counted(lambda: model(inputs_embeds=embeddings).logits)
    half_of_the_square = m.num_layers * 2 * LENGTH * 2 * LENGTH * m.hidden_size * (3 if crossed else 1)
    parts = flops_by_part(r, 2 * LENGTH, 0)
    expected = parts["language"] + parts["head"] + half_of_the_square
    # the rotary table is an outer product of positions and frequencies, about 1e-4 of the whole
    assert measured == pytest.approx(expected, rel=1e-3)


def plain_resampler(r: Recipe, features: torch.Tensor, own: bool) -> torch.Tensor:
    """The resampler's matrix products written out, with the graph structure of the real one."""
    c, width = r.model.connector, r.model.vision.width
    inner, ffn = c.num_heads * c.head_dim, c.ffn_multiple * width

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=own)

    latents = weight(1, c.num_latents, width).expand(features.shape[0], -1, -1)
    for _ in range(c.depth):
        queries = latents * weight(width)
        context = torch.cat([features * weight(width), queries], dim=1)
        q, kv = queries @ weight(width, inner), context @ weight(width, 2 * inner)
        k, v = kv.chunk(2, dim=-1)
        latents = latents + ((q @ k.mT).softmax(-1) @ v) @ weight(inner, width)
        normed = latents * weight(width)
        latents = latents + (normed @ weight(width, ffn)).relu() @ weight(ffn, width)
    return latents


@pytest.mark.parametrize("freeze", [[], ["vision"], ["connector"], ["vision", "connector"]])
def test_resampler(freeze: list[str]) -> None:
    r = recipe(
        "model.assembly=cross_attention",
        "model.connector.kind=resampler",
        "model.connector.depth=2",
        "model.connector.ffn_multiple=3",
        f"training.freeze={freeze}",
    )
    vision, c = r.model.vision, r.model.connector
    features = torch.randn(3, vision.num_features, vision.width, requires_grad="vision" not in freeze)
    measured = counted(lambda: plain_resampler(r, features, "connector" not in freeze))
    unneeded = 0.0
    if freeze == ["connector"]:  # the first latents are constant: their scores need no query gradient
        keys = vision.num_features + c.num_latents
        unneeded = 3 * 2 * c.num_latents * keys * c.num_heads * c.head_dim
    assert flops_by_part(r, LENGTH, 3)["connector"] == measured + unneeded


def plain_qformer(r: Recipe, features: torch.Tensor, own: bool) -> torch.Tensor:
    """The Q-Former's matrix products written out, post-norm, with the graph structure of the real one."""
    c, vision_width = r.model.connector, r.model.vision.width
    width = c.num_heads * c.head_dim

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=own)

    def attend(x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        k, v = (context @ weight(context.shape[-1], 2 * width)).chunk(2, dim=-1)
        return (((x @ weight(width, width)) @ k.mT).softmax(-1) @ v) @ weight(width, width)

    queries = weight(1, c.num_latents, width).expand(features.shape[0], -1, -1)
    features = features * weight(vision_width)
    for layer in range(c.depth):
        queries = (queries + attend(queries, queries)) * weight(width)
        if layer % c.cross_every == 0:
            queries = (queries + attend(queries, features)) * weight(width)
        inner = (queries @ weight(width, c.ffn_multiple * width)).relu()
        queries = (queries + inner @ weight(c.ffn_multiple * width, width)) * weight(width)
    return queries @ weight(width, r.model.language.hidden_size)


@pytest.mark.parametrize("freeze", [[], ["vision"], ["connector"], ["vision", "connector"]])
@pytest.mark.parametrize("cross_every", [1, 2])
def test_qformer(cross_every: int, freeze: list[str]) -> None:
    sizes = {"num_latents": 10, "depth": 3, "num_heads": 5, "head_dim": 16, "ffn_multiple": 3}
    keys = {"kind": "qformer", "cross_every": cross_every, "flag_embeddings": True, **sizes}
    r = recipe(
        *(f"model.connector.{key}={value}" for key, value in keys.items()), f"training.freeze={freeze}"
    )
    vision, c = r.model.vision, r.model.connector
    features = torch.randn(3, vision.num_features, vision.width, requires_grad="vision" not in freeze)
    measured = counted(lambda: plain_qformer(r, features, "connector" not in freeze))
    unneeded = 0.0
    if freeze == ["connector"]:  # the first queries are constant: their scores need no query gradient
        unneeded = 3 * 2 * c.num_latents * vision.num_features * c.num_heads * c.head_dim
    assert flops_by_part(r, LENGTH, 3)["connector"] == measured + unneeded


def plain_decoder(
    r: Recipe, media: torch.Tensor, freeze: list[str], first: int | None = None
) -> torch.Tensor:
    """A decoder with gated blocks as bare matrix products; scores are not masked.

    Args:
        first: layer from which on the language model is trained although it is frozen.
    """
    m, c = r.model.language, r.model.cross_attention
    hidden, kv = m.hidden_size, (m.num_kv_heads or 0) * m.head_dim
    idefics = c.geometry == "idefics"
    inner = hidden if idefics else c.num_heads * c.head_dim
    trained = "language" not in freeze

    def language(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad=trained)

    def gated(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, requires_grad="cross_attention" not in freeze)

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        if not idefics:
            return (x @ gated(hidden, c.ffn_multiple * hidden)) @ gated(c.ffn_multiple * hidden, hidden)
        gate, up = (x @ gated(hidden, 2 * m.ffn_hidden_size)).chunk(2, dim=-1)
        return (gate * up) @ gated(m.ffn_hidden_size, hidden)

    x = language(1, LENGTH, hidden)
    for layer in range(m.num_layers):
        trained = trained or (first is not None and layer >= first)
        if layer % c.every == 0 if idefics else (layer + 1) % c.every == 0:
            normed = x * gated(hidden)
            k, v = (media @ gated(r.model.vision.width, 2 * inner)).chunk(2, dim=-1)
            x = x + (((normed @ gated(hidden, inner)) @ k.mT).softmax(-1) @ v) @ gated(inner, hidden)
            x = x + feed_forward(x * gated(hidden))
        normed = x * language(hidden)
        q, k, v = (normed @ language(hidden, hidden + 2 * kv)).split([hidden, kv, kv], dim=-1)
        groups = hidden // kv
        k, v = k.repeat(1, 1, groups), v.repeat(1, 1, groups)
        x = x + ((q @ k.mT).softmax(-1) @ v) @ language(hidden, hidden)
        gate, up = ((x * language(hidden)) @ language(hidden, 2 * m.ffn_hidden_size)).chunk(2, dim=-1)
        x = x + (gate * up) @ language(m.ffn_hidden_size, hidden)
    return (x * language(hidden)) @ language(hidden, m.vocab_size)


@pytest.mark.parametrize(
    ("freeze", "layers_crossed"),
    [
        (["vision"], 4),
        (["vision", "language"], 3),  # the layer below the first block needs no backward at all
        (["vision", "language", "connector"], 3),
        (["vision", "cross_attention"], 4),
    ],
)
def test_cross_attention_decoder(freeze: list[str], layers_crossed: int) -> None:
    overrides = ["model.assembly=cross_attention", "model.connector.kind=resampler"]
    blocks = ["model.cross_attention.every=2", "model.cross_attention.ffn_multiple=3"]
    r = recipe(*overrides, *blocks, f"training.freeze={freeze}")
    latents, width = r.model.connector.num_latents, r.model.vision.width
    media = torch.randn(1, latents, width, requires_grad="connector" not in freeze)
    measured = counted(lambda: plain_decoder(r, media, freeze))
    parts = flops_by_part(r, LENGTH, 1)
    square = 2 * LENGTH * LENGTH * r.model.language.hidden_size
    other_half = square * (3 * layers_crossed + r.model.language.num_layers - layers_crossed)
    assert parts["cross_attention"] + parts["language"] + parts["head"] + other_half == measured


@pytest.mark.parametrize("freeze", [["vision"], ["vision", "language"], ["vision", "language", "connector"]])
def test_idefics_decoder(freeze: list[str]) -> None:
    """The first block stands before the first layer, so gradients cross all layers."""
    overrides = ["model.assembly=cross_attention", "model.connector.kind=resampler"]
    blocks = ["model.cross_attention.geometry=idefics", "model.cross_attention.every=3"]
    r = recipe(*overrides, *blocks, f"training.freeze={freeze}")
    media = torch.randn(1, r.model.connector.num_latents, r.model.vision.width)
    media.requires_grad_("connector" not in freeze)
    parts = flops_by_part(r, LENGTH, 1)
    other_half = 2 * LENGTH * LENGTH * r.model.language.hidden_size * 3 * r.model.language.num_layers
    counts = parts["cross_attention"] + parts["language"] + parts["head"] + other_half
    assert counts == counted(lambda: plain_decoder(r, media, freeze))


@pytest.mark.parametrize("first", [0, 2, 3])
def test_language_model_trained_from_a_layer_on(first: int) -> None:
    overrides = ["model.assembly=cross_attention", "model.connector.kind=resampler"]
    freeze = ["vision", "connector", "language", "cross_attention"]
    settings = [f"training.freeze={freeze}", f"training.unfreeze.language={first}"]
    r = recipe(*overrides, "model.cross_attention.every=4", *settings)
    media = torch.randn(1, r.model.connector.num_latents, r.model.vision.width)
    parts, crossed = flops_by_part(r, LENGTH, 1), r.model.language.num_layers - first
    other_half = 2 * LENGTH * LENGTH * r.model.language.hidden_size * (3 * crossed + first)
    counts = parts["cross_attention"] + parts["language"] + parts["head"] + other_half
    unneeded = 0.0
    if first < 3:  # keys and values of the frozen block before layer 3 are constant
        inner = r.model.cross_attention.num_heads * r.model.cross_attention.head_dim
        unneeded = 2 * 2 * LENGTH * r.model.connector.num_latents * inner
    assert counts == counted(lambda: plain_decoder(r, media, freeze, first)) + unneeded


def adapted_decoder(r: Recipe, trained: bool) -> torch.Tensor:
    """A frozen decoder with adapters as bare matrix products; its embeddings need no gradient."""
    m, rank = r.model.language, r.model.lora.rank
    hidden, ffn, kv = m.hidden_size, m.ffn_hidden_size, (m.num_kv_heads or 0) * m.head_dim

    def linear(x: torch.Tensor, target: str, out: int) -> torch.Tensor:
        width = x.shape[-1]
        y = x @ torch.randn(width, out)
        if target not in r.model.lora.targets:
            return y
        a, b = torch.randn(width, rank), torch.randn(rank, out)
        return y + (x @ a.requires_grad_(trained)) @ b.requires_grad_(trained)

    x = torch.randn(1, LENGTH, hidden)
    for _ in range(m.num_layers):
        q, k, v = linear(x, "q", hidden), linear(x, "k", kv), linear(x, "v", kv)
        k, v = (y.repeat(1, 1, hidden // kv) for y in (k, v))
        x = x + linear((q @ k.mT).softmax(-1) @ v, "o", hidden)
        x = x + linear(linear(x, "gate", ffn) * linear(x, "up", ffn), "down", hidden)
    return x @ torch.randn(hidden, m.vocab_size)


@pytest.mark.parametrize("freeze", [["vision", "connector", "language"], ["vision", "connector", "lora"]])
@pytest.mark.parametrize("targets", [["q", "k", "v", "o", "gate", "up", "down"], ["k", "up"], ["down"]])
def test_adapters(targets: list[str], freeze: list[str]) -> None:
    settings = ["model.lora.rank=24", f"model.lora.targets={targets}", f"training.freeze={freeze}"]
    r = recipe(*settings)
    layers, hidden = r.model.language.num_layers, r.model.language.hidden_size
    square = 2 * LENGTH * LENGTH * hidden
    parts = flops_by_part(r, LENGTH, 0)
    if "lora" in freeze:  # everything else of the decoder is trained: frozen adapters that gradients cross
        plain = flops_by_part(recipe(f"training.freeze={freeze[:2]}"), LENGTH, 0)
        widths = {"q": 256, "k": 192, "v": 192, "o": 256, "gate": 472, "up": 472, "down": 472}
        adapters = 4 * LENGTH * layers * 24 * sum(widths[target] for target in targets)
        assert parts == {**plain, "language": plain["language"] + adapters}
        return
    crossed = layers if set("qkv") & set(targets) else layers - 1  # by gradients, of the attentions
    unneeded = 0.0
    if (
        targets[0] == "k"
    ):  # in the first layer, q and v are constant: no gradient of q, none of the weighted sum
        unneeded = 2 * LENGTH * LENGTH * hidden * 2
    measured = counted(lambda: adapted_decoder(r, True))
    assert (
        parts["language"] + parts["head"] + square * (3 * crossed + layers - crossed) == measured + unneeded
    )


def test_published_definition_on_a_large_model() -> None:
    """6 P + 6 s d L for trained, 4 P + 6 s d L for frozen but crossed (P without embeddings)."""
    language = {"preset": "llama2-13b"}
    length = "data.sequence_length=2048"
    weights, attention = 13_015_864_320 - 32000 * 5120 - 81 * 5120, 6 * 2048 * 5120 * 40
    per_token = flops_per_step(recipe(length, language=language), 1, 0)
    assert per_token == 6 * weights + attention
    freeze = "training.freeze=[language, vision]"
    frozen = flops_per_step(recipe(length, freeze, language=language), 1, 0)
    assert frozen == 4 * weights + attention


def test_sliding_window_costs_less() -> None:
    full = flops_by_part(recipe(), LENGTH, 0)["language"]
    narrow = flops_by_part(recipe("model.language.sliding_window=8"), LENGTH, 0)["language"]
    wide = flops_by_part(recipe(f"model.language.sliding_window={2 * LENGTH}"), LENGTH, 0)["language"]
    pairs = (32 * 32 / 2) - (8 * 32 - 8 * 8 / 2)  # squares at half, the window's first triangle taken off
    per_pair = 4 * LANGUAGE["hidden_size"] * 3 * LANGUAGE["num_layers"]  # 4 FLOPs; 3: and backward
    assert full - narrow == pairs * per_pair
    assert wide == full


def test_peaks() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") is None
    assert peak_flops("cpu", "bf16") is None
    assert peak_flops("NVIDIA H100 NVL", "bf16") == 835e12
    for gpu in map(gpu_by_name, gpu_names()):  # runs and plans are measured by the same peak
        assert peak_flops(f"NVIDIA {gpu.name}", "bf16") == gpu.bf16_flops


def test_the_output_layer_counts_where_there_is_loss() -> None:
    everywhere, somewhere = flops_by_part(recipe(), 100, 2), flops_by_part(recipe(), 100, 2, num_labels=25)
    assert somewhere["head"] == everywhere["head"] / 4
    assert {**somewhere, "head": 0} == {**everywhere, "head": 0}


def test_documents_attend_to_less_than_rows() -> None:
    rows = flops_by_part(recipe(), 4 * LENGTH, 0)["language"]
    assert flops_by_part(recipe(), 4 * LENGTH, 0, num_pairs=4 * LENGTH**2 // 2)["language"] == rows
    single = flops_by_part(recipe("data.sequence_length=8"), 4 * LENGTH, 0)["language"]
    # documents of eight positions, in rows of any length
    packed = flops_by_part(recipe(), 4 * LENGTH, 0, num_pairs=LENGTH // 2 * 8**2 // 2)["language"]
    assert packed == pytest.approx(single) and packed < rows
