"""Sizes of real models, built on the meta device, against the published counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamm.config import Recipe
from megamm.engine import groups
from megamm.errors import InputError
from megamm.planning.dry_run import dry_run, parameter_counts
from megamm.recipe import load_recipe, recipe_from_dict

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


def recipe(model: dict[str, Any], freeze: list[str], **parallel: int) -> Recipe:
    return recipe_from_dict(
        {
            "name": "size",
            "run_dir": "unused",
            "tokenizer": "unused",
            "model": model,
            "data": {"sequence_length": 2048},
            "training": {"global_batch_size": 64, "freeze": freeze},
            "parallel": parallel,
        }
    )


LLAVA_13B = {"language": {"preset": "vicuna-13b"}, "vision": {"preset": "clip-vit-l-14-336"}}


def test_llava_13b() -> None:
    """LLaVA-1.5-13B: 13,350,839,296 parameters; the projector of the alignment stage 31,467,520; projector
    and language model of the instruction stage 13,047,331,840."""
    alignment = parameter_counts(recipe(LLAVA_13B, ["vision", "language"]))
    assert sum(size.total for size in alignment.values()) == 13_350_839_296
    assert sum(size.trainable for size in alignment.values()) == 31_467_520
    assert alignment["vision"].total == 303_507_456
    instruction = parameter_counts(recipe(LLAVA_13B, ["vision"]))
    assert sum(size.trainable for size in instruction.values()) == 13_047_331_840


@pytest.mark.parametrize(
    "language, vision, every, block, resampler",
    [
        ("llama2-13b", "openclip-vit-g-14", 4, 216_420_354, 112_603_392),
        ("zephyr-7b", "clip-vit-l-14", 2, 139_476_994, 63_019_008),
        ("llama-65b", "openclip-vit-bigg-14", 4, 546_996_226, 153_523_968),
    ],
)
def test_flamingo_blocks(language: str, vision: str, every: int, block: int, resampler: int) -> None:
    """Gated blocks and resampler (6 layers, 64 latents, 8 x 64 heads) have OpenFlamingo's sizes."""
    model = {
        "assembly": "cross_attention",
        "language": {"preset": language},
        "vision": {"preset": vision},
        "connector": {"kind": "resampler"},
        "cross_attention": {"every": every},
    }
    plan = recipe(model, ["vision", "language"])
    counts = parameter_counts(plan)
    assert counts["cross_attention"].total == plan.model.language.num_layers // every * block
    assert counts["connector"].total == resampler
    assert counts["language"].trainable == counts["vision"].trainable == 0
    assert counts["cross_attention"].trainable == counts["cross_attention"].total


def test_the_plan_names_layout_and_batch() -> None:
    text = dry_run(recipe(LLAVA_13B, ["vision"], tensor=4, pipeline=2))
    assert "8 processes = tensor 4 x pipeline 2 x data 1" in text
    assert "64 samples = micro-batch 1 x data 1 x accumulation 64" in text
    assert "13,350,839,296 parameters" in text


def test_a_layout_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(InputError, match="6"):
        dry_run(recipe(LLAVA_13B, ["vision"], tensor=4))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_recipe_of_the_examples_builds(path: Path) -> None:
    assert "parameters" in dry_run(load_recipe(path))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 2
