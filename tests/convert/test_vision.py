"""Vision encoders on their own: recognised, sized, accounted for, at another resolution, refused.

(That the numbers are right is in tests/parity/test_vision.py.)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megamm.config import ModelConfig, Recipe, VisionConfig
from megamm.convert import export_checkpoint, import_checkpoint
from megamm.convert.families import recognise
from megamm.convert.family import Found, Reading, Target
from megamm.convert.rules import Rule, Table
from megamm.convert.tables import clip, eva, llama, openclip
from megamm.engine import checkpoint
from megamm.errors import InputError
from megamm.models.vision.positions import resize_positions
from tests.convert.families import hf_decoder
from tests.convert.helpers import VOCAB_SIZE, assert_bitwise_equal, read_tensors, recipe_for

SMALL = VisionConfig(
    image_size=28, patch_size=7, width=24, num_layers=3, num_heads=2, mlp_width=57, activation="gelu"
)
GIANT = replace(SMALL, norm_eps=1e-6, patch_bias=True, qkv_bias="qv", pre_norm=False)
LARGE = replace(GIANT, activation="swiglu", sub_norm=True, rotary_side=16)
ENORMOUS = replace(GIANT, residual="post_norm")


class Tensors:
    """Tensors in memory, as a source has them in files."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def tensor(self, key: str) -> torch.Tensor:
        return self._tensors[key]


def random_tensors(rules: list[Rule]) -> dict[str, torch.Tensor]:
    return {
        key: torch.randn(shape)
        for rule in rules
        for key, shape in zip(rule.theirs, rule.their_shapes(), strict=True)
    }


def read(
    theirs: dict[str, torch.Tensor],
    config: dict[str, Any] | None = None,
    wanted: VisionConfig | None = None,
    path: Path = Path("source"),
) -> tuple[Reading, dict[str, str]]:
    """What the family makes of a source, and what it leaves out; every key is accounted for."""
    found = Found(path, config or {}, Tensors(theirs))
    family = recognise(found)
    reading = family.read(found, ModelConfig(vision=wanted) if wanted else None)
    names = reading.table.canonical_keys(theirs, "source")
    return reading, reading.table.account(names, "source")


def ours_of(reading: Reading, theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {rule.ours: rule.to_ours([theirs[key] for key in rule.theirs]) for rule in reading.table.rules}


def test_a_directory_of_open_clip(tmp_path: Path) -> None:
    theirs = random_tensors(openclip.rules(SMALL))
    others = ("visual.proj", "text_projection", "transformer.resblocks.0.ln_1.bias", "logit_scale")
    others += ("token_embedding.weight", "positional_embedding", "ln_final.bias", "attn_mask")
    theirs |= {key: torch.ones(1) for key in others}
    model_cfg = {"embed_dim": 8, "vision_cfg": openclip.to_open_clip(SMALL), "text_cfg": {}}
    (tmp_path / openclip.CONFIG_FILE).write_text(json.dumps({"model_cfg": model_cfg}))
    reading, skipped = read(theirs, path=tmp_path)
    assert reading.model.vision == SMALL and reading.parts == ("vision",)
    assert "vision.feature_norm" in reading.leaves_open
    assert skipped.keys() == set(others)


@pytest.mark.parametrize("config", [GIANT, LARGE, ENORMOUS], ids=["g", "L", "E"])
def test_a_directory_of_timm(config: VisionConfig) -> None:
    theirs = random_tensors(eva.rules(config, names="timm")) | {"head.bias": torch.ones(1)}
    reading, skipped = read(theirs, json.loads(json.dumps(eva.to_timm(config))))
    assert reading.model.vision == config and skipped.keys() == {"head.bias"}


def test_a_file_of_the_authors() -> None:
    """BAAI's file says no sizes, so the recipe has to; the rotary buffers are left out."""
    theirs = random_tensors(eva.rules(LARGE, "visual."))
    buffers = {"visual.rope.freqs_cos", "visual.blocks.2.attn.rope.freqs_sin"}
    others = {"visual.head.weight", "text.positional_embedding", "logit_scale"} | buffers
    theirs |= {key: torch.ones(1) for key in others}
    reading, skipped = read(theirs, wanted=LARGE)
    assert reading.model.vision == LARGE and skipped.keys() == others
    assert all("computed" in skipped[key] for key in buffers)
    with pytest.raises(InputError, match="source: weights without a configuration; say with --recipe"):
        read(theirs)


def test_an_encoder_within_a_clip_of_open_clip() -> None:
    theirs = random_tensors(eva.rules(LARGE, "visual.trunk.", "timm"))
    reading, _ = read(theirs | {"visual.trunk.head.weight": torch.ones(1)}, wanted=LARGE)
    assert ours_of(reading, theirs)["vision.blocks.2.attention.norm.weight"].shape == (24,)


def test_blip2_takes_all_blocks_but_the_last() -> None:
    theirs = random_tensors(eva.rules(GIANT))
    cut = replace(GIANT, num_layers=2, post_norm=False)
    reading, skipped = read(theirs, wanted=cut)
    assert "norm.weight" in skipped and "blocks.2.attn.q_bias" in skipped
    assert not any(key.startswith("blocks.1.") for key in skipped)
    ours = ours_of(reading, theirs)
    assert "vision.blocks.1.mlp.fc2.weight" in ours and "vision.post_norm.weight" not in ours
    with pytest.raises(InputError, match="unknown key"):  # two blocks too many are a mistake
        read(theirs, wanted=replace(cut, num_layers=1))


def test_a_file_of_the_authors_beside_a_language_model(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Into one checkpoint, at a larger image size than the file was trained at; left-overs are reported."""
    hf_decoder(vocab_size=VOCAB_SIZE).save_pretrained(tmp_path / "language")
    theirs = random_tensors(eva.rules(LARGE, "visual."))
    torch.save(theirs | {"visual.rope.freqs_cos": torch.ones(1)}, tmp_path / "eva.pt")
    language = llama.from_hf(json.loads((tmp_path / "language" / "config.json").read_text()), "config.json")
    vision = replace(LARGE, image_size=42, weights_image_size=28, feature_layer=-1, feature_norm=True)
    recipe = recipe_for(ModelConfig(language=language, vision=vision))
    recipe.training.precision = "fp32"
    lines: list[str] = []
    sources = [tmp_path / "language", tmp_path / "eva.pt"]
    out = import_checkpoint(sources, tmp_path / "out", recipe, tokenizer_dir, report=lines.append)
    weights = checkpoint.read_weights(out)
    embedding = theirs["visual.pos_embed"][0]
    assert torch.equal(weights["vision.position_embedding"], resize_positions(embedding, 6))
    w1, w2 = (theirs[f"visual.blocks.1.mlp.{name}.weight"] for name in ("w1", "w2"))
    assert torch.equal(weights["vision.blocks.1.mlp.fc1.weight"], torch.cat([w1, w2]))
    assert checkpoint.read_recipe(out).model.vision == vision
    assert any("visual.rope.freqs_cos: a buffer" in line for line in lines)
    with pytest.raises(InputError, match="pos_embed has shape"):
        recipe.model.vision = replace(vision, weights_image_size=None)
        import_checkpoint(sources, tmp_path / "other", recipe, tokenizer_dir)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("family", ["eva", "openclip"])
def test_an_encoder_there_and_back(family: str, tmp_path: Path) -> None:
    source, config = tmp_path / "source", LARGE if family == "eva" else SMALL
    source.mkdir()
    rules = eva.rules(config, names="timm") if family == "eva" else openclip.rules(config)
    theirs = random_tensors(rules)
    save_file(theirs, source / "model.safetensors")
    if family == "eva":
        (source / "config.json").write_text(json.dumps(eva.to_timm(config)))
    else:
        model_cfg = {"model_cfg": {"vision_cfg": openclip.to_open_clip(config)}}
        (source / openclip.CONFIG_FILE).write_text(json.dumps(model_cfg))
    imported = import_checkpoint([source], tmp_path / "checkpoint")
    report = export_checkpoint(imported, tmp_path / "out", family=family)
    assert_bitwise_equal(read_tensors(report.out), theirs)


def clip_config(config: VisionConfig) -> dict[str, Any]:
    return clip.to_hf(config)


@pytest.mark.parametrize("family", ["clip", "openclip", "timm", "baai"])
def test_positions_are_interpolated_when_the_recipe_says_so(family: str) -> None:
    source = GIANT if family in ("timm", "baai") else SMALL
    rules = {
        "clip": lambda: clip.rules(source, "vision_model."),
        "openclip": lambda: openclip.rules(source),
        "timm": lambda: eva.rules(source, names="timm"),
        "baai": lambda: eva.rules(source),
    }[family]()
    config = {"clip": clip_config, "timm": eva.to_timm}.get(family, lambda _: {})(source)
    theirs = random_tensors(rules)
    larger = replace(source, image_size=42, weights_image_size=28)
    reading, _ = read(theirs, config, larger)
    assert reading.model.vision.image_size == 42
    ours = ours_of(reading, theirs)
    plain = ours_of(replace(reading, table=Table(rules)), theirs)
    assert ours.keys() == plain.keys()
    for name, tensor in ours.items():
        if name == "vision.position_embedding":
            assert torch.equal(tensor, resize_positions(plain[name], 6)) and tensor.shape == (37, 24)
        else:
            assert torch.equal(tensor, plain[name])
    if config:  # without a word of the recipe the source stays as it is, and differs from the recipe
        silent, _ = read(theirs, config, replace(larger, weights_image_size=None))
        assert silent.model.vision.image_size == 28


def test_each_format_refuses_the_encoders_of_the_other() -> None:
    for config, rules in ((GIANT, clip.rules), (LARGE, openclip.rules)):
        with pytest.raises(InputError, match="patch_bias True, qkv_bias qv"):
            rules(config)
    with pytest.raises(InputError, match="EVA's encoders have patch_bias true"):
        eva.rules(SMALL)
    for config in (
        replace(LARGE, rotary_side=None),
        replace(GIANT, post_norm=False),
        replace(GIANT, norm_eps=1),
    ):
        with pytest.raises(InputError, match="this one is another"):
            eva.to_timm(config)
    with pytest.raises(InputError, match=r"norm_eps: is 1e-06"):
        openclip.to_open_clip(replace(SMALL, norm_eps=1e-6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name is 'vit'"),
        ({"vision_cfg": {"pool_type": "avg"}}, "pool_type is 'avg'"),
        ({"vision_cfg": {"width": 100}}, "width 100 must be a multiple of head_width 64"),
        ({"vision_cfg": None}, "no JSON object"),
        ({"vision_cfg": {}, "quick_gelu": 1}, "quick_gelu is 1"),
    ],
)
def test_configurations_of_open_clip_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        openclip.from_open_clip(change, "open_clip_config.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit_base"}, "architecture is 'vit_base'"),
        ({"model_args": {"swiglu_mlp": False}}, "swiglu_mlp is False"),
        ({"model_args": {"embed_dim": 100, "num_heads": 3}}, "embed_dim 100 must be a multiple"),
        ({"model_args": {"ref_feat_shape": [16, 24]}}, "ref_feat_shape is"),
        ({"model_args": {"depth": 0}}, "depth is 0"),
    ],
)
def test_configurations_of_timm_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        eva.from_timm({"architecture": "eva02_large_patch14_clip_224", **change}, "config.json")


@pytest.mark.parametrize("config", [SMALL, LARGE], ids=["openclip", "eva"])
def test_what_is_written_beside_the_weights_is_read_again(config: VisionConfig, tmp_path: Path) -> None:
    recipe = Recipe(name="x", run_dir="x", tokenizer="x", model=ModelConfig(vision=config))
    target = Target(tmp_path, recipe, None, {}, None, torch.float32)
    family = openclip.FAMILY if config is SMALL else eva.FAMILY
    assert family.export is not None
    family.export.extras(target)
    values = json.loads(json.dumps(family.export.config(target))) if family.export.config else {}
    theirs = random_tensors(family.export.table(recipe.model).rules)
    reading, _ = read(theirs, values, path=tmp_path)
    assert reading.model.vision == config


def test_the_configurations_of_published_models() -> None:
    """As open_clip and timm ship them, against the presets."""
    import yaml

    from megamm.recipe import PRESET_DIR
    from tests.parity import references

    presets = yaml.safe_load((PRESET_DIR / "vision.yaml").read_text())

    def preset(name: str) -> VisionConfig:
        return VisionConfig(**{**presets[name], "norm_eps": float(presets[name]["norm_eps"])})

    shipped = references.open_clip().get_model_config
    for name in ("H", "g", "bigG"):
        found = openclip.from_open_clip(shipped(f"ViT-{name}-14"), name)
        assert found == preset(f"openclip-vit-{name.lower()}-14")
    for architecture, name in {
        "eva_giant_patch14_clip_224": "eva01-clip-g-14",
        "eva02_large_patch14_clip_224": "eva02-clip-l-14",
        "eva02_large_patch14_clip_336": "eva02-clip-l-14-336",
        "eva02_enormous_patch14_clip_224": "eva02-clip-e-14",
    }.items():
        config = {"architecture": architecture}
        assert eva.from_timm(config, name) == preset(name)
        with torch.device("meta"):
            theirs = references.timm().create_model(architecture, num_classes=0)
        table = Table(eva.rules(preset(name), names="timm"))
        shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
        assert shapes == {key: tuple(t.shape) for key, t in meta_tensors(table).items()}


def meta_tensors(table: Table) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return random_tensors(table.rules)
