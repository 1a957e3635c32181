"""Decoders alone: LLaMA, Mistral, InternLM; there and back, configurations of both generations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.config import LanguageConfig, ModelConfig
from megamm.convert.engine import write_json
from megamm.convert.tables import internlm, llama
from megamm.errors import InputError
from tests.convert.families import hf_decoder, run_remote, target, there_and_back
from tests.convert.helpers import assert_bitwise_equal

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one kv head": dict(num_key_value_heads=1, hidden_size=48, num_attention_heads=6),
    "llama": dict(num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=5e5),
    "mistral": dict(sliding_window=7, vocab_size=101),
    "biases": dict(num_key_value_heads=4, attention_bias=True),
    "odd vocabulary": dict(vocab_size=97, num_hidden_layers=3, intermediate_size=56),
    "tied": dict(tie_word_embeddings=True),
}
IDS: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = hf_decoder(**VARIANTS[variant]).to(dtype)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    language = llama.from_hf(config_of(tmp_path / "hf"), "config.json")
    there_and_back(llama.table(language), tmp_path / "hf", tmp_path / "out")
    write_json(tmp_path / "out" / "config.json", llama.to_hf(language, IDS))
    assert llama.from_hf(config_of(tmp_path / "out"), "config.json") == language

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not {kind: keys for kind, keys in info.items() if keys}
    assert type(loaded) is type(theirs)
    assert_bitwise_equal(dict(loaded.to(dtype).state_dict()), dict(theirs.state_dict()))
    ids = torch.arange(12)[None] % language.vocab_size
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, theirs(input_ids=ids).logits)


def test_mistral_without_a_window_is_llama() -> None:
    """null means none; a key that is not there means the default of the class."""
    sizes = dict(model_type="mistral", hidden_size=32, num_attention_heads=16, intermediate_size=40)
    assert llama.from_hf({**sizes, "sliding_window": None}, "").sliding_window is None
    assert llama.from_hf(sizes, "").sliding_window == 4096
    assert llama.from_hf({**sizes, "num_key_value_heads": 2}, "").num_kv_heads == 2
    assert llama.from_hf({**sizes, "num_key_value_heads": None}, "").num_kv_heads == 16


def test_configurations_of_both_generations_mean_the_same() -> None:
    sizes = dict(model_type="llama", hidden_size=32, num_attention_heads=4, rms_norm_eps=1e-5)
    old = {**sizes, "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float16"}
    new = {**sizes, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "float16"}
    assert llama.from_hf(old, "") == llama.from_hf(new, "")
    assert llama.from_hf(old, "").rope_theta == 5e5


# --- InternLM -----------------------------------------------------------------------------------------

INTERNLM = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm.InternLMConfig"},
    "bias": True,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "model_type": "internlm",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 103168,
}


@pytest.mark.parametrize("rotary", [None, {"base": 10000, "type": "dynamic"}])
def test_public_internlm(rotary: dict[str, Any] | None) -> None:
    language = internlm.from_hf({**INTERNLM, "rotary": rotary}, "config.json")
    assert language == LanguageConfig(
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=32,
        ffn_hidden_size=11008,
        vocab_size=103168,
        norm_eps=1e-6,
        qkv_bias=True,
        out_bias=True,
    )
    shapes = [shape for rule in internlm.table(language).rules for shape in rule.their_shapes()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == 7_321_948_160
    with pytest.raises(InputError, match="rotary: type is 'linear'"):
        internlm.from_hf({**INTERNLM, "rotary": {"base": 10000, "type": "linear"}}, "config.json")


@pytest.mark.parametrize("bias", [True, False])
def test_internlm_there_and_back_and_loaded_with_its_own_code(bias: bool, tmp_path: Path) -> None:
    theirs = hf_decoder(num_key_value_heads=4, attention_bias=bias, rope_theta=500.0)
    theirs.save_pretrained(tmp_path / "hf")
    language = llama.from_hf(theirs.config.to_dict(), "config.json")
    there_and_back(internlm.table(language), tmp_path / "hf", tmp_path / "out")
    goal = target(tmp_path / "out", ModelConfig(language=language))
    export = internlm.FAMILY.export
    assert export is not None and export.config is not None
    write_json(goal.directory / "config.json", export.config(goal))
    export.extras(goal)
    assert internlm.from_hf(config_of(tmp_path / "out"), "config.json") == language
    ids = torch.arange(1, 13)[None]
    found = run_remote(tmp_path / "out", {"input_ids": ids})
    with torch.no_grad():
        assert torch.equal(found, theirs(input_ids=ids).logits)
    assert "trust_remote_code=True" in (tmp_path / "out" / "README.md").read_text()


def test_internlm_has_no_grouped_queries() -> None:
    language = llama.from_hf(hf_decoder().config.to_dict(), "")
    with pytest.raises(InputError, match="neither a sliding window nor grouped queries"):
        internlm.check(language)
