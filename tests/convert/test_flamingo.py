"""OpenFlamingo and InfiMM: keys there and back, and exported directories that run by their own model code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megamm.config import (
    ConnectorConfig,
    CrossAttentionConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megamm.convert.families import FAMILIES, recognise
from megamm.convert.family import Family, Found
from megamm.convert.files import SourceFiles
from megamm.convert.tables import infimm, open_flamingo
from megamm.engine.groups import Groups
from megamm.errors import InputError
from tests.convert.families import (
    IMAGE_ID,
    export_to,
    megamm_logits,
    random_tensors,
    run_remote,
    there_and_back,
    to_ours,
)
from tests.one_process import layout
from tests.parity.families import text_and_images, text_only

__all__ = ["layout"]  # a fixture

LANGUAGE = LanguageConfig(
    num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=40, vocab_size=67
)
SIZES: dict[str, Any] = dict(image_size=28, patch_size=14, width=24, num_layers=2, num_heads=2, mlp_width=40)
EVA: dict[str, Any] = dict(norm_eps=1e-6, patch_bias=True, qkv_bias="qv", pre_norm=False, feature_layer=-1)
LARGE: dict[str, Any] = dict(activation="swiglu", sub_norm=True, rotary_side=16)
VISIONS = {
    "clip": VisionConfig(**SIZES, activation="quick_gelu", feature_layer=-1, feature_norm=True),
    "eva g": VisionConfig(**SIZES, **EVA, activation="gelu", feature_select="all"),
    "eva L": VisionConfig(
        **{**SIZES, "image_size": 42, "mlp_width": 37}, **EVA, **LARGE, feature_select="all"
    ),
    "eva E": VisionConfig(**SIZES, **EVA, activation="gelu", residual="post_norm", feature_select="all"),
}
SMALL = ConnectorConfig(kind="resampler", num_latents=3, depth=2, num_heads=2, head_dim=10, ffn_multiple=3)


def model_of(vision: str, language: dict[str, Any], every: int = 2, small: bool = True) -> ModelConfig:
    sizes = dict(num_heads=3, head_dim=6, ffn_multiple=2) if small else {}
    return ModelConfig(
        assembly="cross_attention",
        language=replace(LANGUAGE, **language),
        vision=VISIONS[vision],
        connector=SMALL if small else ConnectorConfig(kind="resampler"),
        cross_attention=CrossAttentionConfig(every=every, skip_text_only=vision != "clip", **sizes),
    )


VARIANTS: dict[str, tuple[Family, ModelConfig]] = {
    "open_flamingo": (open_flamingo.FAMILY, model_of("clip", {})),
    "open_flamingo, tied mistral": (
        open_flamingo.FAMILY,
        model_of("clip", dict(tie_embeddings=True, sliding_window=7, vocab_size=101), every=1),
    ),
    "infimm g": (infimm.FAMILY, model_of("eva g", dict(sliding_window=7), every=3)),
    "infimm L": (infimm.FAMILY, model_of("eva L", dict(num_kv_heads=4, num_layers=3))),
    "infimm E, real geometry": (infimm.FAMILY, model_of("eva E", {}, small=False)),
    "infimm, tied": (infimm.FAMILY, model_of("eva g", dict(tie_embeddings=True))),
}


def table_of(family: Family, model: ModelConfig) -> Any:
    assert family.export is not None
    return family.export.table(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_and_run_by_its_own_code(variant: str, layout: Groups, tmp_path: Path) -> None:
    family, model = VARIANTS[variant]
    table = table_of(family, model)
    theirs = random_tensors(table)
    (tmp_path / "hf").mkdir()
    save_file(theirs, tmp_path / "hf" / "model.safetensors")
    ours = there_and_back(table, tmp_path / "hf", tmp_path / "out")
    export_to(tmp_path / "out", family, model, theirs)

    source = Found(
        tmp_path / "out",
        json.loads((tmp_path / "out" / "config.json").read_text()),
        SourceFiles(tmp_path / "out"),
    )
    assert recognise(source) is family
    reading = family.read(source, None)
    heads = model.language.num_kv_heads or model.language.num_heads
    assert reading.model == replace(model, language=replace(model.language, num_kv_heads=heads))
    assert reading.image_id == IMAGE_ID and reading.parts == open_flamingo.PARTS

    batch = text_and_images(model.language.vocab_size, IMAGE_ID, 1, model.vision.image_size)
    wanted = megamm_logits(model, layout, ours, batch, IMAGE_ID)
    inputs = {"input_ids": batch.input_ids, "pixel_values": batch.images}
    found = run_remote(tmp_path / "out", inputs)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_text_alone_and_answers(layout: Groups, tmp_path: Path) -> None:
    """Samples without images; greedy answers with and without a cache, of padded prompts."""
    family, model = VARIANTS["infimm g"]
    theirs = random_tensors(table_of(family, model), std=0.4)
    export_to(tmp_path / "out", family, model, theirs)
    ours = to_ours(table_of(family, model), theirs)
    alone = text_only(model.language.vocab_size)
    alone.input_ids[alone.input_ids == IMAGE_ID] = 1
    found = run_remote(tmp_path / "out", {"input_ids": alone.input_ids})
    torch.testing.assert_close(
        found, megamm_logits(model, layout, ours, alone, IMAGE_ID), atol=1e-5, rtol=1e-5
    )

    batch = text_and_images(model.language.vocab_size, IMAGE_ID, 1, 28)
    inputs = {"input_ids": batch.input_ids, "pixel_values": batch.images, "vocab": torch.tensor(0)}
    answers = run_remote(tmp_path / "out", inputs, GENERATE)
    ids = batch.input_ids
    for _ in range(5):
        step = replace(batch, input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, -1))
        logits = megamm_logits(model, layout, ours, step, IMAGE_ID)[:, -1]
        logits[:, IMAGE_ID] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(answers, ids)


GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM
directory, inputs, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()
given = torch.load(inputs)
ids, pixels = given["input_ids"], given["pixel_values"]
settings = dict(do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
settings |= dict(bad_words_ids=[[model.config.image_token_id]])
results = [
    model.generate(ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), use_cache=cache, **settings)
    for cache in (True, False)
]
assert torch.equal(*results)
# two positions of padding in front change nothing
padded = torch.nn.functional.pad(ids, (2, 0))
mask = torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
shifted = model.generate(padded, pixel_values=pixels, attention_mask=mask, **settings)
assert torch.equal(shifted[:, 2:], results[0])
beams = model.generate(ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), num_beams=3, **settings)
assert beams.shape == results[0].shape
torch.save(results[0], out)
"""


# --- the public formats -------------------------------------------------------------------------------


def test_public_infimm_with_what_it_holds_twice(tmp_path: Path) -> None:
    """infimm-zephyr's config.json in small: OpenFlamingo's geometry is not named; some tensors come
    twice, some nobody needs."""
    model = model_of("eva L", dict(sliding_window=4096, num_layers=2, norm_eps=1e-5), small=False)
    table = infimm.table(model)
    theirs = random_tensors(table)
    prefix = "model.lang_encoder."
    extra = {
        f"{prefix}old_decoder_blocks.0.self_attn.q_proj.weight": torch.ones(2),
        f"{prefix}gated_cross_attn_layers.1.attn_gate": torch.ones(1),
        "model.vision_encoder.head.weight": torch.ones(3, 24),
        "model.vision_encoder.rope.freqs_cos": torch.ones(4),
        "model.vision_encoder.blocks.1.attn.rope.freqs_sin": torch.ones(4),
        f"{prefix}model.layers.0.decoder_layer.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    (tmp_path / "hf").mkdir()
    save_file(theirs | extra, tmp_path / "hf" / "model.safetensors")
    there_and_back(table, tmp_path / "hf", tmp_path / "out")
    reasons = table.account([*theirs, *extra], "")
    assert set(reasons) == set(extra) and all(reasons.values())
    config = {
        "model_type": "infimm-zephyr",
        "architectures": ["InfiMMZephyrModel"],
        "cross_attn_every_n_layers": 2,
        "eoc_token_id": 65,
        "image_token_id": 66,
        "freeze_llm": True,
        "visual": {
            "image_size": 42,
            "layers": 2,
            "width": 24,
            "head_width": 12,
            "patch_size": 14,
            "mlp_ratio": 1.5417,
            "eva_model_name": "eva-clip-l-14-336",
            "drop_path_rate": 0.0,
            "xattn": True,
            "fusedLN": True,
            "rope": True,
            "pt_hw_seq_len": 16,
            "intp_freq": True,
            "naiveswiglu": True,
            "subln": True,
            "embed_dim": 768,
        },
        "language": {
            "model_type": "mistral",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 67,
        },
    }
    assert infimm.from_hf(config, "config.json") == model
    found = Found(tmp_path / "hf", config, SourceFiles(tmp_path / "hf"))
    assert recognise(found) is infimm.FAMILY
    assert infimm.FAMILY.read(found, None).image_id == 66


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoint_of_open_flamingo(wrapped: bool, tmp_path: Path) -> None:
    """Resampler, gated blocks and embeddings; the recipe may add tokens."""
    model = model_of("clip", dict(num_layers=5), every=2, small=False)
    table = open_flamingo.checkpoint_table(model)
    theirs = random_tensors(table)
    assert len(theirs) == 1 + 6 * 11 + 2 + 1 + 2 * 11
    prefix = "module." if wrapped else ""
    state = {prefix + key: tensor for key, tensor in theirs.items()}
    path = tmp_path / "checkpoint.pt"
    torch.save({"epoch": 1, "model_state_dict": state} if wrapped else state, path)
    found = Found(path, {}, SourceFiles(path))
    assert recognise(found) is open_flamingo.FAMILY
    larger = replace(model, language=replace(model.language, vocab_size=70))
    reading = open_flamingo.FAMILY.read(found, larger)
    assert reading.parts == ("connector", "cross_attention") and reading.model == model
    ours = to_ours(reading.table, {reading.table.canonical(key): tensor for key, tensor in state.items()})
    whole = to_ours(table, theirs)
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in whole)

    with pytest.raises(InputError, match="--recipe: needed with"):
        open_flamingo.FAMILY.read(found, None)
    smaller = replace(model, language=replace(model.language, vocab_size=60))
    with pytest.raises(InputError, match=r"vocab_size is 60, but .* has 67 tokens"):
        open_flamingo.FAMILY.read(found, smaller)
    other = {key.replace("model.layers", "transformer.blocks"): value for key, value in state.items()}
    other = {key.replace("model.embed_tokens", "transformer.wte"): value for key, value in other.items()}
    torch.save(other, tmp_path / "mpt.pt")
    with pytest.raises(InputError, match="whose language model is LLaMA or Mistral"):
        open_flamingo.FAMILY.read(Found(tmp_path / "mpt.pt", {}, SourceFiles(tmp_path / "mpt.pt")), model)


@pytest.mark.parametrize(
    ("variant", "section", "change", "message"),
    [
        (
            "open_flamingo",
            "cross_attention",
            {"skip_text_only": True},
            "skip_text_only: is True, but an OpenF",
        ),
        ("open_flamingo", "cross_attention", {"geometry": "idefics"}, "geometry flamingo is an OpenFlamingo"),
        ("open_flamingo", "vision", {"feature_layer": -2}, "vision.feature_layer: is -2"),
        ("open_flamingo", "vision", {"feature_norm": False}, "vision.feature_norm: is False"),
        ("open_flamingo", "vision", {"patch_bias": True}, "CLIP has no encoder with patch_bias"),
        ("infimm g", "connector", {"activation": "relu"}, "connector.activation: is relu"),
        ("infimm g", "vision", {"patch_bias": False}, "EVA's encoders have patch_bias"),
        ("infimm g", "vision", {"post_norm": False}, "whole EVA-CLIP encoders"),
        ("infimm g", "language", {"qkv_bias": True}, "biases on all four"),
    ],
)
def test_what_cannot_be_expressed(variant: str, section: str, change: dict[str, Any], message: str) -> None:
    family, model = VARIANTS[variant]
    table_of(family, model)
    other = replace(model, **{section: replace(getattr(model, section), **change)})
    with pytest.raises(InputError, match=message):
        table_of(family, other)


def test_names_of_families_are_different() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
