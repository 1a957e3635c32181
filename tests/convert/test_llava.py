"""transformers -> megamm -> transformers: bitwise equal weights, and both sides load without a complaint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megamm.config import ModelConfig
from megamm.convert import export_checkpoint, export_llava, import_checkpoint, import_llava
from megamm.convert.engine import INDEX_NAME
from megamm.convert.files import SourceFiles
from megamm.convert.tables import clip, llama, llava
from megamm.errors import InputError
from tests.convert.helpers import (
    VOCAB_SIZE,
    assert_bitwise_equal,
    edit_config,
    hf_llava,
    hub_layout,
    read_tensors,
    recipe_for,
    save_hf,
)

VARIANTS = {
    "plain": {},
    "biases": dict(text=dict(attention_bias=True)),
    "tied": dict(text=dict(tie_word_embeddings=True), tie_word_embeddings=True),
    "multi-head": dict(text=dict(num_key_value_heads=4)),
    "mistral": dict(text=dict(sliding_window=64, rope_theta=5e5)),
    "odd vocabulary, class token kept": dict(
        text=dict(vocab_size=VOCAB_SIZE + 13), vision_feature_select_strategy="full", image_seq_length=5
    ),
    "gelu, last layer": dict(vision=dict(hidden_act="gelu"), vision_feature_layer=-1),
}


def load_strictly(directory: Path) -> torch.nn.Module:
    """from_pretrained, and nothing may be missing, left over or of another shape."""
    from transformers import LlavaForConditionalGeneration

    model, info = LlavaForConditionalGeneration.from_pretrained(directory, output_loading_info=True)
    complaints = {kind: keys for kind, keys in info.items() if keys}
    assert not complaints
    return model.eval()


def export_again(source: Path, tokenizer_dir: Path, out: Path, **options) -> Path:
    found = import_llava(source)
    export_llava(found.tensors, recipe_for(found.model), tokenizer_dir, out, **options)
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_bitwise_equal(variant, tokenizer, tokenizer_dir, tmp_path):
    model = hf_llava(**VARIANTS[variant])
    source = save_hf(model, tokenizer, tmp_path / "hf")
    out = export_again(source, tokenizer_dir, tmp_path / "out")
    assert_bitwise_equal(read_tensors(out), hub_layout(read_tensors(source)))
    loaded = load_strictly(out)
    assert_bitwise_equal(dict(loaded.state_dict()), dict(model.state_dict()))
    ids = torch.full((1, 8), VOCAB_SIZE - 1)
    positions = model.config.image_seq_length
    ids[:, positions:] = 7
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        wanted = model(input_ids=ids, pixel_values=pixels).logits
        assert torch.equal(loaded(input_ids=ids, pixel_values=pixels).logits, wanted)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_configured_value_survives(variant, tokenizer, tokenizer_dir, tmp_path):
    from transformers import LlavaConfig

    model = hf_llava(**VARIANTS[variant])
    source = save_hf(model, tokenizer, tmp_path / "hf")
    out = export_again(source, tokenizer_dir, tmp_path / "out")
    ours, theirs = LlavaConfig.from_pretrained(out).to_dict(), LlavaConfig.from_pretrained(source).to_dict()
    # Not the model's: provenance, and token ids, which the export takes from the tokenizer.
    for section in (ours, theirs, *(c[s] for c in (ours, theirs) for s in ("text_config", "vision_config"))):
        for key in (
            "_name_or_path",
            "architectures",
            "pad_token_id",
            "bos_token_id",
            "eos_token_id",
            "dtype",
        ):
            section.pop(key, None)
    # The same value under the name of transformers 4.
    ours["text_config"].pop("rope_theta", None)
    # Not used: only CLIP's contrastive head has it.
    ours["vision_config"].pop("projection_dim"), theirs["vision_config"].pop("projection_dim")
    assert ours == theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_bits(dtype, tokenizer, tokenizer_dir, tmp_path):
    source = save_hf(hf_llava().to(dtype), tokenizer, tmp_path / "hf")
    out = export_again(source, tokenizer_dir, tmp_path / "out")
    assert_bitwise_equal(read_tensors(out), hub_layout(read_tensors(source)))
    assert next(load_strictly(out).parameters()).dtype == dtype


def rewrite(source: Path, out: Path, rename) -> Path:
    """The same directory with other keys."""
    shutil.copytree(source, out)
    tensors = {rename(key): tensor for key, tensor in read_tensors(source).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def public_layout(key: str) -> str:
    return key.replace("vision_tower.", "vision_tower.vision_model.")


def memory_layout(key: str) -> str:
    if key == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + key.replace("language_model.model.", "language_model.")


def memory_layout_with_vision_model(key: str) -> str:
    return public_layout(memory_layout(key))


@pytest.mark.parametrize("layout", [public_layout, memory_layout, memory_layout_with_vision_model])
def test_all_layouts_of_keys_are_read(layout, llava_dir, tokenizer_dir, tmp_path):
    source = rewrite(llava_dir, tmp_path / "other", layout)
    out = export_again(source, tokenizer_dir, tmp_path / "out")
    assert_bitwise_equal(read_tensors(out), hub_layout(read_tensors(llava_dir)))


def linear(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def clip_keys(num_layers: int) -> set[str]:
    """As on the hub."""
    keys = {f"embeddings.{name}" for name in ("class_embedding", "patch_embedding.weight")}
    keys |= {"embeddings.position_embedding.weight"} | linear("pre_layrnorm", "post_layernorm")
    attention = [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    for n in range(num_layers):
        block = linear("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *attention)
        keys |= {f"encoder.layers.{n}.{key}" for key in block}
    return {f"vision_model.{key}" for key in keys}


def test_written_are_the_keys_of_the_hub(llava_dir, tokenizer_dir, tmp_path):
    """Those of llava-hf/llava-1.5-7b-hf: the only ones that vLLM's model, which adds no names, has."""
    decoder = {"embed_tokens.weight", "norm.weight"}
    for n in range(2):
        parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [
            "input_layernorm",
            "post_attention_layernorm",
        ]
        parts += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
        decoder |= {f"layers.{n}.{part}.weight" for part in parts}
    wanted = {f"language_model.model.{key}" for key in decoder} | {"language_model.lm_head.weight"}
    wanted |= linear("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
    wanted |= {f"vision_tower.{key}" for key in clip_keys(3)}
    out = export_again(llava_dir, tokenizer_dir, tmp_path / "out")
    assert set(read_tensors(out)) == wanted


def test_an_encoder_alone_is_written_with_the_keys_of_the_hub(llava_dir, tmp_path):
    from transformers import CLIPVisionModel

    checkpoint = import_checkpoint([llava_dir], tmp_path / "checkpoint")
    first = export_checkpoint(checkpoint, tmp_path / "first", "clip").out
    assert set(read_tensors(first)) == clip_keys(3)
    loaded, info = CLIPVisionModel.from_pretrained(first, output_loading_info=True)
    assert not any(info.values())
    fresh = CLIPVisionModel(loaded.config)  # one that was loaded is saved as it was found
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(tmp_path / "saved")
    assert hub_layout(read_tensors(tmp_path / "saved")).keys() != read_tensors(tmp_path / "saved").keys()
    for source in (first, tmp_path / "saved"):
        imported = import_checkpoint([source], tmp_path / f"{source.name}.ckpt")
        again = export_checkpoint(imported, tmp_path / f"{source.name}.again", "clip").out
        assert_bitwise_equal(read_tensors(again), read_tensors(first))


def test_buffers_of_old_releases_are_skipped_with_a_reason(llava_dir, tmp_path):
    source = tmp_path / "old"
    shutil.copytree(llava_dir, source)
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    save_file(read_tensors(llava_dir) | extra, source / "model.safetensors", metadata={"format": "pt"})
    found = import_llava(source)
    assert len(found.skipped) == 2 and all(found.skipped.values())
    assert not any("rotary" in key for key in found.tensors)


def test_padding_of_the_vocabulary_is_stripped(llava_dir, tokenizer_dir, tmp_path):
    found = import_llava(llava_dir)
    tensors = dict(found.tensors)
    for key in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        assert len(tensors[key]) == VOCAB_SIZE
        tensors[key] = torch.cat([tensors[key], torch.randn(92, 32)])
    export_llava(tensors, recipe_for(found.model), tokenizer_dir, tmp_path / "out")
    assert_bitwise_equal(read_tensors(tmp_path / "out"), hub_layout(read_tensors(llava_dir)))


def test_shards_and_index(llava_dir, tokenizer_dir, tmp_path):
    out = export_again(llava_dir, tokenizer_dir, tmp_path / "out", max_shard_bytes=20_000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and not (out / "model.safetensors").exists()
    sizes = {shard.name: shard.stat().st_size for shard in shards}
    index = json.loads((out / INDEX_NAME).read_text())
    assert set(index["weight_map"].values()) == set(sizes)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(llava_dir).values())
    alone = {name for name in sizes if list(index["weight_map"].values()).count(name) == 1}
    assert all(size < 20_000 + 5_000 for name, size in sizes.items() if name not in alone)  # + header
    assert_bitwise_equal(read_tensors(out), hub_layout(read_tensors(llava_dir)))
    load_strictly(out)
    again = export_again(out, tokenizer_dir, tmp_path / "again")
    assert_bitwise_equal(read_tensors(again), hub_layout(read_tensors(llava_dir)))


def test_mixed_types_are_kept_and_readable(llava_dir, tokenizer_dir, tmp_path):
    found = import_llava(llava_dir)
    tensors = {
        key: tensor if key.startswith("connector") else tensor.bfloat16()
        for key, tensor in found.tensors.items()
    }
    odd = "vision.class_embedding"
    report = export_llava(tensors, recipe_for(found.model), tokenizer_dir, tmp_path / "out")
    assert any("several types" in note for note in report.notes)
    back = dict(import_llava(tmp_path / "out").tensors)
    assert_bitwise_equal(back, tensors)
    assert back[odd].dtype == torch.bfloat16


def test_report_counts_what_was_written(llava_dir, tokenizer_dir, tmp_path):
    found = import_llava(llava_dir)
    report = export_llava(found.tensors, recipe_for(found.model), tokenizer_dir, tmp_path / "out")
    wanted = read_tensors(llava_dir)
    assert report.num_tensors == len(wanted)
    assert report.num_bytes == sum(tensor.nbytes for tensor in wanted.values())
    assert report.files == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert report.family == "llava" and report.notes == []


def test_configuration_of_transformers_4(llava_dir, tmp_path):
    """rope_theta and torch_dtype instead of rope_parameters and dtype; defaults left out; both image ids."""
    source = tmp_path / "old"
    shutil.copytree(llava_dir, source)

    def to_old(config):
        text = config["text_config"]
        del text["rope_parameters"], text["head_dim"], text["hidden_act"], config["vision_feature_layer"]
        text["rope_theta"] = 12345.0
        text["rope_scaling"] = None
        config["torch_dtype"] = config.pop("dtype")
        config["image_token_id"] = config.pop("image_token_index")
        del config["vision_config"]["layer_norm_eps"], config["vision_config"]["hidden_act"]

    edit_config(source, to_old)
    model = import_llava(source).model
    assert model.language.rope_theta == 12345.0
    assert model.vision.feature_layer == -2 and model.vision.activation == "quick_gelu"


def test_defaults_are_those_of_the_classes():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig

    classes = {"llama": LlamaConfig(), "mistral": MistralConfig()}
    for kind, defaults in llama.DEFAULTS.items():
        theirs = classes[kind].to_dict()
        theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
        known = {key: value for key, value in defaults.items() if key in theirs}
        assert len(known) >= 9 and known == {key: theirs[key] for key in known}
    assert {key: CLIPVisionConfig().to_dict()[key] for key in clip.DEFAULTS} == clip.DEFAULTS
    config = LlavaConfig().to_dict()
    assert {key: config[key] for key in llava.DEFAULTS} == llava.DEFAULTS
    found = llava.from_hf({}, "config.json")
    assert found.vision.width == config["vision_config"]["hidden_size"] == 1024
    assert found.vision.num_layers == config["vision_config"]["num_hidden_layers"] == 24
    assert found.language.hidden_size == 4096


def test_public_configuration_gives_the_public_model():
    """llava-1.5-7b-hf's config.json, which leaves out every default."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava",
        "pad_token_id": 32001,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }
    model = llava.from_hf(config, "config.json")
    assert model.tokens_per_image == 576
    assert (model.language.num_layers, model.language.ffn_hidden_size) == (32, 11008)
    shapes = {
        key: s
        for rule in llava.table(model).rules
        for key, s in zip(rule.theirs, rule.their_shapes(), strict=True)
    }
    # 7,063,427,072 weights in the public 7B checkpoint (vocabulary padded to 32064)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 7_063_427_072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: replace(m, assembly="cross_attention"), "no LLaVA model"),
        (lambda m: replace(m, connector=replace(m.connector, kind="resampler")), "no LLaVA model"),
        (lambda m: replace(m, language=replace(m.language, qkv_bias=True)), "biases on all four"),
        (lambda m: replace(m, vision=replace(m.vision, feature_norm=True)), "without a norm"),
        (lambda m: replace(m, vision=replace(m.vision, rotary_side=16)), "no encoder with rotary_side 16"),
        (lambda m: replace(m, language=replace(m.language, vocab_size=100)), "420 tokens"),
    ],
)
def test_what_llava_cannot_express_is_not_exported(change, message, llava_dir, tokenizer_dir, tmp_path):
    found = import_llava(llava_dir)
    model: ModelConfig = change(found.model)
    with pytest.raises(InputError, match=message):
        export_llava(found.tensors, recipe_for(model), tokenizer_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_not_exported(llava_dir, tokenizer_dir, tmp_path):
    found = import_llava(llava_dir)
    key = "language.decoder.final_layernorm.weight"
    without = {k: t for k, t in found.tensors.items() if k != key}
    for tensors, message in (
        (without, r"1 missing key\(s\): language.decoder.final"),
        (without | {key: torch.ones(7)}, r"final_layernorm.weight has shape \[7\]"),
        (without | {key: torch.ones(32, dtype=torch.int32)}, "has type torch.int32"),
    ):
        with pytest.raises(InputError, match=message):
            export_llava(tensors, recipe_for(found.model), tokenizer_dir, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_one_tensor_at_a_time(llava_dir, tokenizer_dir, tmp_path, monkeypatch):
    """Export reads no tensor before it is needed: the peak is one tensor, not a model."""
    import weakref

    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    peak = 0
    plain = SourceFiles.tensor

    def counted(self, key):
        nonlocal peak
        tensor = plain(self, key)
        alive.add(tensor)
        peak = max(peak, len(alive))
        return tensor

    monkeypatch.setattr(SourceFiles, "tensor", counted)
    export_again(llava_dir, tokenizer_dir, tmp_path / "out")
    assert 3 <= peak <= 6  # three of one rule, and those of the rule before
