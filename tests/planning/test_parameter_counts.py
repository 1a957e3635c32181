"""Parameters of the published models and systems, counted on models that are built on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from megamm.config import Recipe
from megamm.planning.dry_run import PartSize, parameter_counts
from megamm.recipe import recipe_from_dict

TINY_VISION = {"preset": "tiny-vit"}


def counts(model: dict[str, Any], **training: Any) -> dict[str, PartSize]:
    """Of a recipe with this model, all in the least other settings that are valid."""
    return parameter_counts(recipe_of(model, **training))


def recipe_of(model: dict[str, Any], **training: Any) -> Recipe:
    raw = {"name": "counted", "run_dir": "unused", "tokenizer": "unused", "model": model}
    return recipe_from_dict({**raw, "data": {"train": "unused"}, "training": training})


@pytest.mark.parametrize(
    ("preset", "vocab_size", "wanted"),
    [
        ("llama-7b", 32000, 6_738_415_616),
        ("llama2-7b", 32000, 6_738_415_616),
        ("llama-13b", 32000, 13_015_864_320),
        ("vicuna-13b", 32000, 13_015_864_320),
        ("llama2-13b", 32002, 13_015_884_800),
        ("llama-65b", 32000, 65_285_660_672),
        ("llama2-70b", 32000, 68_976_648_192),
        ("mistral-7b", 32000, 7_241_732_096),
        ("zephyr-7b", 32002, 7_241_748_480),
        ("internlm-7b", 103168, 7_321_948_160),
        ("internlm-7b", 103170, 7_321_964_544),
    ],
)
def test_language_models(preset: str, vocab_size: int, wanted: int) -> None:
    language = {"preset": preset, "vocab_size": vocab_size}
    assert counts({"language": language, "vision": TINY_VISION})["language"].total == wanted


def test_adapters_of_xcomposer() -> None:
    """r = 256 on q, v, up and down of InternLM-7B, the number of the published index."""
    lora = {"rank": 256, "alpha": 256, "dropout": 0.05, "targets": ["q", "v", "up", "down"]}
    model = {"language": {"preset": "internlm-7b"}, "vision": TINY_VISION, "lora": lora}
    found = counts(model, freeze=["vision", "language"])
    assert found["lora"] == PartSize(381_681_664, 381_681_664)
    assert found["language"] == PartSize(7_321_948_160, 0)


# --- the four systems: total, and what a stage trains ---------------------------------------------------

ALL_FEATURES = {"feature_layer": -1, "feature_select": "all"}
NOT_LANGUAGE, NOT_VISION = {"freeze": ["vision", "language"]}, {"freeze": ["vision"]}


def infimm(language: str, vision: str, every: int) -> dict[str, Any]:
    return {
        "assembly": "cross_attention",
        "language": {"preset": language, "vocab_size": 32002},
        "vision": {"preset": vision, **ALL_FEATURES},
        "connector": {"kind": "resampler"},
        "cross_attention": {"every": every, "skip_text_only": True},
    }


def xcomposer(queries: int, vision: str = "eva02-clip-l-14-336", vocab_size: int = 103168) -> dict[str, Any]:
    bert = {"depth": 12, "num_heads": 12, "head_dim": 64, "cross_every": 2, "flag_embeddings": True}
    return {
        "assembly": "merged",
        "language": {"preset": "internlm-7b", "vocab_size": vocab_size},
        "vision": {"preset": vision, **ALL_FEATURES},
        "connector": {"kind": "qformer", "num_latents": queries, **bert},
    }


def cross_attention_65b(vision: str, idefics: bool = False) -> dict[str, Any]:
    connector = {"num_heads": 16, "head_dim": 96, "activation": "relu"} if idefics else {}
    return {
        "assembly": "cross_attention",
        "language": {"preset": "llama-65b"},
        "vision": {"preset": vision, **ALL_FEATURES},
        "connector": {"kind": "resampler", **connector},
        "cross_attention": {"every": 4, "geometry": "idefics" if idefics else "flamingo"},
    }


PUBLIC_XCOMPOSER = {
    **xcomposer(64, "eva01-clip-g-14-blip2", 103170),
    "lora": {"rank": 256, "alpha": 256, "targets": ["q", "v", "up", "down"]},
}
LLAVA = {"language": {"preset": "vicuna-13b"}, "vision": {"preset": "clip-vit-l-14-336"}}
# Projections of encoders into CLIP's common space, which counts of others include, are not ours.
EVA_L_HEAD, BIGG_PROJECTION, G_PROJECTION = 787_200, 1664 * 1280, 1408 * 1024
SYSTEMS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    "InfiMM Zephyr": (infimm("zephyr-7b", "eva01-clip-g-14", 2), NOT_LANGUAGE, 10_603_421_344, 2_350_526_752),
    "InfiMM Zephyr, tuned": (
        infimm("zephyr-7b", "eva01-clip-g-14", 2),
        NOT_VISION,
        10_603_421_344,
        9_592_275_232,
    ),
    "InfiMM Zephyr, published": (
        infimm("zephyr-7b", "eva02-clip-l-14-336", 2),
        NOT_LANGUAGE,
        9_840_832_224 - EVA_L_HEAD,
        2_294_650_912,
    ),
    "InfiMM 13B": (infimm("llama2-13b", "eva01-clip-g-14", 2), NOT_LANGUAGE, 18_468_041_384, 4_441_010_472),
    "InfiMM 13B, tuned": (
        infimm("vicuna-13b", "eva01-clip-g-14", 2),
        NOT_VISION,
        18_468_041_384,
        17_456_895_272,
    ),
    "InfiMM 13B, every 4th": (
        infimm("llama2-13b", "eva01-clip-g-14", 4),
        NOT_LANGUAGE,
        16_303_837_844,
        2_276_806_932,
    ),
    "InfiMM 13B, every 4th, tuned": (
        infimm("llama2-13b", "eva01-clip-g-14", 4),
        NOT_VISION,
        16_303_837_844,
        15_292_691_732,
    ),
    "InfiMM Vicuna": (
        infimm("vicuna-13b", "eva02-clip-e-14", 4),
        NOT_LANGUAGE,
        19_709_084_948,
        2_344_479_252,
    ),
    "XComposer": (xcomposer(64), NOT_LANGUAGE, 7_730_401_728, 104_799_744),
    "XComposer, 32 queries": (xcomposer(32), NOT_LANGUAGE, 7_730_377_152, 104_775_168),
    "XComposer, published": (PUBLIC_XCOMPOSER, NOT_LANGUAGE, 8_797_888_384, 108_339_456 + 381_681_664),
    "65B, Flamingo's blocks": (
        cross_attention_65b("openclip-vit-bigg-14"),
        NOT_LANGUAGE,
        78_224_016_424 - BIGG_PROJECTION,
        11_093_448_488,
    ),
    "65B, Flamingo's blocks, g": (
        cross_attention_65b("openclip-vit-g-14"),
        NOT_LANGUAGE,
        77_345_591_336 - G_PROJECTION,
        11_047_285_032,
    ),
    "65B, IDEFICS' blocks": (
        cross_attention_65b("openclip-vit-bigg-14", idefics=True),
        NOT_LANGUAGE,
        81_374_102_568,
        20 * 702_562_306 + 194_418_432,
    ),
    "LLaVA-1.5, alignment": (LLAVA, NOT_LANGUAGE, 13_350_839_296, 31_467_520),
    "LLaVA-1.5, instruction": (LLAVA, NOT_VISION, 13_350_839_296, 13_047_331_840),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems(system: str) -> None:
    model, training, total, trained = SYSTEMS[system]
    found = counts(model, **training).values()
    assert (sum(part.total for part in found), sum(part.trainable for part in found)) == (total, trained)
