"""Small recipes are of the same kind as the large ones, and their batches exercise them."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.batch import IGNORE_INDEX
from megamm.config import Recipe, SourceConfig
from megamm.parity.batches import synthetic_batch
from megamm.parity.layouts import parse_layouts
from megamm.parity.run import make_plan
from megamm.parity.shrink import IMAGE_ID
from megamm.recipe import load_recipe, recipe_from_dict

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))
LAYOUTS = "tp8sp,tp2pp2sp,pp2vpp2,tp3,pp3dp3,dp4"
# Sections of the model whose switches decide which code runs; what becomes smaller.
SIZES = {
    *["preset", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size", "vocab_size"],
    *["max_positions", "sliding_window", "init_std", "image_size", "patch_size", "width", "mlp_width"],
    *["feature_layer", "num_latents", "depth", "head_dim", "every", "cross_every", "image_token_id"],
}

XCOMPOSER = {
    "language": {"preset": "internlm-7b"},
    "vision": {"preset": "clip-vit-l-14-336", "feature_layer": -1, "feature_select": "all"},
    "connector": {"kind": "qformer", "num_heads": 12, "depth": 12, "flag_embeddings": True},
}
INFIMM: dict[str, Any] = {
    "assembly": "cross_attention",
    "language": {"preset": "zephyr-7b"},
    "vision": {"preset": "openclip-vit-g-14", "feature_layer": 40},
    "connector": {"kind": "resampler"},
    "cross_attention": {"every": 2, "skip_text_only": True},
}


def recipe(model: dict[str, Any], **training: Any) -> Recipe:
    return recipe_from_dict(
        {
            "name": "large",
            "run_dir": "unused",
            "tokenizer": "unused",
            "model": model,
            "training": {"global_batch_size": 64, "micro_batch_size": 1, **training},
        }
    )


def switches(large: Recipe) -> dict[str, Any]:
    sections = {"assembly": large.model.assembly, "freeze": large.training.freeze, "pack": large.data.pack}
    for section, values in asdict(large.model).items():
        if isinstance(values, dict):
            sections[section] = {key: value for key, value in values.items() if key not in SIZES}
    if large.model.assembly == "cross_attention":  # the blocks' own heads are sizes too
        sections["cross_attention"].pop("num_heads", None)
    return sections


@pytest.mark.parametrize(
    "large",
    [*map(load_recipe, RECIPES), recipe(XCOMPOSER), recipe(INFIMM)],
    ids=[*(path.stem for path in RECIPES), "xcomposer", "infimm"],
)
def test_small_recipes_have_the_same_switches_and_fit_every_layout(large: Recipe) -> None:
    plan = make_plan(large, parse_layouts(LAYOUTS), full_size=False)  # validates in each layout
    small = plan.recipe
    assert switches(small) == switches(large)
    assert small.training.precision == "fp32"
    size = small.model.language
    assert size.hidden_size <= 768 and size.num_layers <= 12 and small.data.sequence_length <= 96
    wanted, got = large.model.language, small.model.language
    is_grouped = (wanted.num_kv_heads or wanted.num_heads) < wanted.num_heads
    assert ((got.num_kv_heads or got.num_heads) < got.num_heads) == is_grouped
    assert bool(got.sliding_window) == bool(wanted.sliding_window)
    if got.sliding_window:
        assert got.sliding_window < small.data.sequence_length
    per_step = small.training.global_batch_size // small.training.micro_batch_size
    assert per_step % 4 == 0 and per_step % 3 == 0  # dp4, pp3dp3


def test_what_was_changed_is_said_exactly() -> None:
    large = recipe(INFIMM, precision="bf16")
    plan = make_plan(large, parse_layouts("tp2"), full_size=False)
    assert "model.language.num_layers 32 -> 4" in plan.changes
    assert "training.precision bf16 -> fp32" in plan.changes
    assert "model.vision.feature_layer 40 -> -1" in plan.changes
    full = make_plan(large, parse_layouts("tp2"), full_size=True)
    assert {text.split(" ")[0] for text in full.changes} == {
        *["training.precision", "training.global_batch_size", "model.image_token_id", "training.device"]
    }


def test_layouts_that_only_the_small_recipe_has_are_noted() -> None:
    plan = make_plan(recipe(XCOMPOSER), parse_layouts("tp2,tp8"), full_size=False)
    assert len(plan.notes) == 1 and plan.notes[0].startswith("tp8: ")
    assert "12 is not divisible by parallel.tensor 8" in plan.notes[0]


def test_partly_trained_modules_stay_partly_trained() -> None:
    frozen = {"freeze": ["vision", "language"], "unfreeze": {"vision": 30, "language": 31}}
    small = make_plan(recipe(INFIMM, **frozen), parse_layouts("pp2"), full_size=False).recipe
    assert small.training.unfreeze.vision in (1, 2) and small.training.unfreeze.language == 3
    frozen = {"freeze": ["vision", "language"], "unfreeze": {"vision": 0}}
    small = make_plan(recipe(INFIMM, **frozen), parse_layouts("pp2"), full_size=False).recipe
    assert small.training.unfreeze.vision == 0 and small.training.unfreeze.language is None
    early = {**INFIMM, "vision": {**INFIMM["vision"], "feature_layer": 10}}  # leaves one small block
    frozen = {"freeze": ["vision"], "unfreeze": {"vision": 5}}
    small = make_plan(recipe(early, **frozen), parse_layouts("pp2"), full_size=False).recipe
    assert small.training.unfreeze.vision == 0


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("model", [XCOMPOSER, INFIMM], ids=["merged", "cross_attention"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_batches(pack: bool, model: dict[str, Any], micro_batch_size: int) -> None:
    large = recipe(model, micro_batch_size=micro_batch_size)
    large.data.pack = pack
    small = make_plan(large, parse_layouts("tp2"), full_size=False).recipe
    counts = []
    for index in range(4):
        batch, again = synthetic_batch(small, index), synthetic_batch(small, index)
        assert torch.equal(batch.input_ids, again.input_ids) and torch.equal(batch.images, again.images)
        positions = (batch.input_ids == IMAGE_ID).sum(dim=1)
        assert torch.equal(positions, batch.images_per_sample * small.model.tokens_per_image)
        assert batch.num_images == int(batch.images_per_sample.sum())
        carries_loss = batch.labels != IGNORE_INDEX
        assert 0 < int(carries_loss.sum()) < carries_loss.numel()
        assert not (batch.labels == IMAGE_ID).any()
        assert batch.packed == pack
        rows = small.training.micro_batch_size
        length = small.data.sequence_length
        assert batch.input_ids.shape == ((1, rows * length) if pack else (rows, length))
        if pack and rows > 1:
            assert len(batch.document_lengths()) >= 3  # two documents and the padding
        assert int(batch.images_per_sample.max()) <= small.data.max_images * (rows if pack else 1)
        counts.append(batch.num_images)
    assert min(counts) == 0 or pack  # a micro-batch of text only
    assert len(set(counts)) >= 2


def shrunk_length(large: Recipe) -> int:
    data = replace(large.data, train=None)
    return make_plan(replace(large, data=data), parse_layouts("tp2"), False).recipe.data.sequence_length


@pytest.mark.parametrize("full_size", [True, False])
def test_several_sources_are_compared_at_the_longest(full_size: bool) -> None:
    large = load_recipe(RECIPES[0])
    lengths = [large.data.sequence_length, large.data.sequence_length - 1]
    large.data.train = [SourceConfig(f"s{i}", sequence_length=length) for i, length in enumerate(lengths)]
    large.data.sequence_length = 7
    data = make_plan(large, parse_layouts("tp2"), full_size).recipe.data
    assert data.train is None and data.sequence_lengths() == [data.sequence_length]
    assert data.sequence_length == (lengths[0] if full_size else shrunk_length(large))
