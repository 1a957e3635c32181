"""IDEFICS: transformers -> megamm -> transformers, bitwise, and loadable without a complaint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import IdeficsForVisionText2Text

from megamm.convert.engine import write_json
from megamm.convert.fields import image_token_id
from megamm.convert.tables import idefics
from megamm.errors import InputError
from megamm.planning.dry_run import fake_model
from megamm.recipe import load_recipe
from tests.convert.families import hf_idefics, there_and_back
from tests.convert.helpers import assert_bitwise_equal

ROOT = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "added tokens": {},
    "none added, every layer": dict(additional_vocab_size=0, cross_layer_interval=1, vocab_size=61),
    "normed queries and keys, vector gates": dict(
        qk_layer_norms=True, alpha_type="vector", perceiver=dict(qk_layer_norms_perceiver=True)
    ),
    "tied": dict(tie_word_embeddings=True),
    "other sizes": dict(
        hidden_size=48,
        num_attention_heads=6,
        num_hidden_layers=6,
        cross_layer_interval=3,
        vision=dict(embed_dim=36, num_attention_heads=3, hidden_act="quick_gelu"),
        perceiver=dict(resampler_n_heads=3, resampler_head_dim=20, resampler_depth=1),
    ),
}


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tmp_path: Path) -> None:
    theirs = hf_idefics(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "hf")
    model = idefics.from_hf(config_of(tmp_path / "hf"), "config.json")
    there_and_back(idefics.table(model), tmp_path / "hf", tmp_path / "out")
    ids: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    write_json(tmp_path / "out" / "config.json", idefics.to_hf(model, ids, 5, torch.float32))
    assert idefics.from_hf(config_of(tmp_path / "out"), "config.json") == model
    assert image_token_id(config_of(tmp_path / "out"), "config.json") == 5

    loaded, info = IdeficsForVisionText2Text.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    assert_bitwise_equal(dict(loaded.state_dict()), dict(theirs.state_dict()))
    kept = {"vocab_size", "additional_vocab_size", "rms_norm_eps", "vision_config", "perceiver_config"}
    kept |= {"alpha_type", "qk_layer_norms", "cross_layer_interval", "rope_parameters", "tie_word_embeddings"}
    ours, wanted = loaded.config.to_dict(), theirs.config.to_dict()
    for config in (ours, wanted):
        for section in ("vision_config", "perceiver_config"):
            config[section] = {k: v for k, v in config[section].items() if k in _section_defaults(section)}
    assert {key: ours[key] for key in kept} == {key: wanted[key] for key in kept}


def _section_defaults(section: str) -> dict[str, Any]:
    return idefics.VISION_DEFAULTS if section == "vision_config" else idefics.PERCEIVER_DEFAULTS


def test_defaults_are_those_of_the_class() -> None:
    from transformers import IdeficsConfig

    config = IdeficsConfig().to_dict()
    for defaults, theirs in (
        (idefics.DEFAULTS, config),
        (idefics.VISION_DEFAULTS, config["vision_config"]),
        (idefics.PERCEIVER_DEFAULTS, config["perceiver_config"]),
    ):
        assert {key: theirs[key] for key in defaults} == defaults


def test_configuration_of_transformers_4(tmp_path: Path) -> None:
    """No rope_parameters, and buffers among the weights."""
    hf_idefics().save_pretrained(tmp_path / "hf")
    config = config_of(tmp_path / "hf")
    new = idefics.from_hf(config, "config.json")
    config["torch_dtype"] = config.pop("dtype")
    del config["rope_parameters"], config["vision_config"]["hidden_act"]
    assert idefics.from_hf(config, "config.json") == new
    with pytest.raises(InputError, match="use_resampler is False"):
        idefics.from_hf({**config, "use_resampler": False}, "config.json")


def test_the_65b_recipe_maps_completely() -> None:
    recipe = load_recipe(ROOT / "examples/flamingo_65b/pretrain.yaml")
    table = idefics.table(recipe.model)
    with fake_model(replace(recipe, parallel=type(recipe.parallel)(backend="local")), 1, 0) as (_, models):
        shapes = {name: tuple(p.shape) for name, p in models[0].named_parameters()}
        wanted = {rule.ours: rule.our_shape() for rule in table.rules}
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 81_374_126_376
        assert sum(torch.Size(shape).numel() for shape in wanted.values()) == 81_374_126_376
    with torch.device("meta"):
        config = idefics.to_hf(recipe.model, {}, 32000, torch.bfloat16)
        theirs = IdeficsForVisionText2Text(IdeficsForVisionText2Text.config_class(**config))
    keys = {key: tuple(p.shape) for key, p in theirs.state_dict().items()}
    assert keys == {
        key: shape
        for rule in table.rules
        for key, shape in zip(rule.theirs, rule.their_shapes(), strict=True)
    }


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("language", {"num_kv_heads": 2}, "language.num_kv_heads: is 2, but an IDEFICS model has 4"),
        ("language", {"num_layers": 5}, "cross_attention.every: is 2"),
        ("language", {"sliding_window": 7}, "language.sliding_window"),
        ("connector", {"activation": "gelu"}, "connector.activation: is gelu"),
        ("vision", {"feature_layer": -2}, "vision.feature_layer: is -2"),
        ("cross_attention", {"geometry": "flamingo"}, "geometry idefics"),
    ],
)
def test_what_idefics_cannot_express(
    section: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    hf_idefics().save_pretrained(tmp_path / "hf")
    model = idefics.from_hf(config_of(tmp_path / "hf"), "config.json")
    idefics.check_family(model)
    other = replace(model, **{section: replace(getattr(model, section), **change)})
    with pytest.raises(InputError, match=message):
        idefics.check_family(other)
