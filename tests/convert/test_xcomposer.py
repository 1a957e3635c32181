"""InternLM-XComposer: keys there and back, and exported directories that run by their own model code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megamm.cli import main
from megamm.config import ConnectorConfig, LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from megamm.convert.families import recognise
from megamm.convert.family import Found
from megamm.convert.files import SourceFiles
from megamm.convert.tables import peft, xcomposer
from megamm.engine.checkpoint import write_weights
from megamm.engine.groups import Groups
from megamm.engine.weight_files import whole_tensors
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
from tests.convert.helpers import read_tensors, recipe_for
from tests.convert.test_flamingo import GENERATE, SIZES, VISIONS
from tests.one_process import layout
from tests.parity.families import text_and_images

__all__ = ["layout"]  # a fixture

LANGUAGE = LanguageConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    ffn_hidden_size=40,
    vocab_size=67,
    qkv_bias=True,
    out_bias=True,
)
CONNECTOR = ConnectorConfig(
    kind="qformer", num_latents=3, depth=3, num_heads=2, head_dim=10, ffn_multiple=3, flag_embeddings=True
)
LORA = LoraConfig(rank=2, alpha=3.0, dropout=0.05, targets=["q", "v", "up", "down"])
BLIP2 = replace(VISIONS["eva g"], post_norm=False)


def model_of(vision: VisionConfig = BLIP2, **sections: Any) -> ModelConfig:
    values = dict(language=LANGUAGE, connector=CONNECTOR, lora=LORA) | sections
    return ModelConfig(assembly="merged", vision=vision, **values)


VARIANTS = {
    "as published": model_of(),
    "EVA L, no adapters, no flags": model_of(
        VISIONS["eva L"],
        connector=replace(CONNECTOR, flag_embeddings=False, cross_every=1, num_latents=2),
        lora=LoraConfig(),
        language=replace(LANGUAGE, qkv_bias=False, out_bias=False, vocab_size=103, tie_embeddings=True),
    ),
    "all adapters, grouped queries": model_of(
        VISIONS["eva g"],
        language=replace(LANGUAGE, num_kv_heads=2, qkv_bias=False, out_bias=False, rope_theta=500.0),
        lora=replace(LORA, targets=["q", "k", "v", "o", "up", "down"]),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back_and_run_by_its_own_code(variant: str, layout: Groups, tmp_path: Path) -> None:
    model = VARIANTS[variant]
    table = xcomposer.table(model)
    theirs = random_tensors(table, std=0.3)
    (tmp_path / "hf").mkdir()
    save_file(theirs, tmp_path / "hf" / "model.safetensors")
    ours = there_and_back(table, tmp_path / "hf", tmp_path / "out")
    out = export_to(tmp_path / "out", xcomposer.FAMILY, model, theirs)

    source = Found(out, json.loads((out / "config.json").read_text()), SourceFiles(out))
    assert recognise(source) is xcomposer.FAMILY
    reading = xcomposer.FAMILY.read(source, None)
    heads = model.language.num_kv_heads or model.language.num_heads
    assert reading.model == replace(model, language=replace(model.language, num_kv_heads=heads))
    assert reading.image_id == IMAGE_ID
    assert ("lora" in reading.parts) == bool(model.lora.rank)

    vocab_size, size = model.language.vocab_size, model.vision.image_size
    batch = text_and_images(vocab_size, IMAGE_ID, model.tokens_per_image, size)
    wanted = megamm_logits(model, layout, ours, batch, IMAGE_ID)
    found = run_remote(out, {"input_ids": batch.input_ids, "pixel_values": batch.images})
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_merged_adapters(layout: Groups, tmp_path: Path) -> None:
    """The merged export has plain weights, and by its own code the logits of the checkpoint with adapters."""
    model = replace(VARIANTS["as published"], lora=replace(LORA, targets=["q", "gate"]))
    plain = replace(model, lora=LoraConfig())
    theirs = random_tensors(xcomposer.table(plain), std=0.3)
    recipe = recipe_for(replace(model, image_token_id=IMAGE_ID))
    recipe.training.precision = "fp32"
    adapters = {rule.ours: torch.randn(rule.our_shape()) for rule in peft.rules(model, "")}
    ours = to_ours(xcomposer.table(plain), theirs) | adapters
    write_weights(tmp_path / "adapted", whole_tensors(ours), recipe, None)
    command = ["convert", "export", "--family", "xcomposer", "--checkpoint", str(tmp_path / "adapted")]
    assert main([*command, "--out", str(tmp_path / "none")]) == 2  # gate has no place in the format
    assert main([*command, "--out", str(tmp_path / "out"), "--merge-lora"]) == 0

    written = read_tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["internlm_lora"] is None and config["lora_cfg"] is None
    assert written.keys() == theirs.keys()
    batch = text_and_images(model.language.vocab_size, IMAGE_ID, model.tokens_per_image, 28)
    wanted = megamm_logits(model, layout, ours, batch, IMAGE_ID)
    found = run_remote(tmp_path / "out", {"input_ids": batch.input_ids, "pixel_values": batch.images})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (megamm_logits(plain, layout, ours, batch, IMAGE_ID) - wanted).abs().max() > 0.1


def test_there_must_be_adapters_to_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = replace(VARIANTS["EVA L, no adapters, no flags"], image_token_id=IMAGE_ID)
    ours = to_ours(xcomposer.table(model), random_tensors(xcomposer.table(model)))
    write_weights(tmp_path / "plain", whole_tensors(ours), recipe_for(model), None)
    command = ["convert", "export", "--family", "xcomposer", "--checkpoint", str(tmp_path / "plain")]
    assert main([*command, "--out", str(tmp_path / "out"), "--merge-lora"]) == 2
    said = "megamm: --merge-lora: the checkpoint has no adapters (LoRA); export it without this option\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


def test_answers(layout: Groups, tmp_path: Path) -> None:
    """Greedy, with and without a cache, of padded prompts, by beams."""
    model = VARIANTS["as published"]
    table = xcomposer.table(model)
    theirs = random_tensors(table, std=0.4)
    out = export_to(tmp_path / "out", xcomposer.FAMILY, model, theirs)
    ours = to_ours(table, theirs)
    batch = text_and_images(model.language.vocab_size, IMAGE_ID, model.tokens_per_image, 28)
    answers = run_remote(out, {"input_ids": batch.input_ids, "pixel_values": batch.images}, GENERATE)
    ids = batch.input_ids
    for _ in range(5):
        step = replace(batch, input_ids=ids, position_ids=torch.arange(ids.shape[1]).expand(3, -1))
        logits = megamm_logits(model, layout, ours, step, IMAGE_ID)[:, -1]
        logits[:, IMAGE_ID] = -torch.inf
        ids = torch.cat([ids, logits.argmax(dim=-1, keepdim=True)], dim=1)
    assert torch.equal(answers, ids)


# of internlm-xcomposer-vl-7b
PUBLIC: dict[str, Any] = {
    "architectures": ["InternLMXComposerForCausalLM"],
    "bias": True,
    "bos_token_id": 1,
    "device": "cuda",
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "intern_converted_llm": True,
    "internlm_lora": {
        "freeze": False,
        "learn_param": ["q", "v", "ffn"],
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        "lora_r": 256,
    },
    "kqvo_bias": True,
    "max_position_embeddings": 2048,
    "model_type": "InternLMXComposer",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_quant": 32,
    "num_query_token": 64,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 103170,
}


def test_public_configuration_gives_the_public_model() -> None:
    """The number of its parameters is that of the published weights."""
    model = xcomposer.from_hf(PUBLIC, "config.json")
    assert model.lora == LoraConfig(rank=256, alpha=256.0, dropout=0.05, targets=["q", "v", "up", "down"])
    assert model.tokens_per_image == 66
    table = xcomposer.table(model)
    sizes = {
        key: torch.Size(shape).numel()
        for rule in table.rules
        for key, shape in zip(rule.theirs, rule.their_shapes(), strict=True)
    }
    assert sum(sizes.values()) == 8_797_888_384
    assert sum(size for key, size in sizes.items() if "lora_" in key) == 381_681_664
    buffers = [
        "Qformer.bert.embeddings.position_ids",
        "internlm_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    assert set(table.account([*sizes, *buffers], "")) == set(buffers)


def test_public_configuration_without_adapters() -> None:
    """As internlm-xcomposer-7b-4bit has it."""
    assert xcomposer.from_hf({**PUBLIC, "internlm_lora": None}, "config.json").lora.rank == 0
    lora = {**PUBLIC["internlm_lora"], "learn_param": ["q", "mlp"]}
    with pytest.raises(InputError, match=r"internlm_lora: learn_param is \['q', 'mlp'\]"):
        xcomposer.from_hf({**PUBLIC, "internlm_lora": lora}, "config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(lora=replace(LORA, targets=["q", "up"])), "on up and down together"),
        (dict(lora=replace(LORA, targets=["gate"])), "model.lora.targets: are gate"),
        (dict(connector=ConnectorConfig(kind="mlp")), "a merged model with a mlp connector is no InternLM-X"),
        (dict(language=replace(LANGUAGE, out_bias=False)), "biases on all four"),
        (dict(vision=replace(BLIP2, feature_layer=-2)), "vision.feature_layer: is 1"),
        (dict(vision=replace(BLIP2, feature_select="patch")), "vision.feature_select: is patch"),
        (dict(vision=VisionConfig(**SIZES, feature_layer=-1, feature_select="all", norm_eps=1e-6)), "EVA's"),
    ],
)
def test_what_cannot_be_expressed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        xcomposer.table(replace(model_of(), **change))
