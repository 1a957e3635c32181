"""Recipes: precedence, round trip, messages, validation, presets."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.config import LanguageConfig, Recipe
from megamm.errors import InputError
from megamm.recipe import (
    PRESET_DIR,
    load_recipe,
    recipe_from_dict,
    recipe_hash,
    recipe_to_yaml,
    valid_keys,
    validate,
    validate_world,
)

ROOT = Path(__file__).parents[2]
LANGUAGE = {"num_layers": 4, "hidden_size": 128, "num_heads": 4, "ffn_hidden_size": 344, "vocab_size": 512}
VISION = {"image_size": 32, "patch_size": 8, "width": 96, "num_layers": 4, "num_heads": 4, "mlp_width": 320}
BASE: dict[str, Any] = {
    "name": "test",
    "run_dir": "runs/test",
    "tokenizer": "tokenizer",
    "model": {"language": LANGUAGE, "vision": VISION},
    "data": {"sequence_length": 128},
}
HEAD = "run_dir: r\ntokenizer: t\nname: n\n"
FLAMINGO = ["model.assembly=cross_attention", "model.connector.kind=resampler"]


def make(*overrides: str) -> Recipe:
    return recipe_from_dict(BASE, overrides=overrides)


def with_preset(part: str, name: str, *overrides: str) -> Recipe:
    """The recipe whose `part` ("language" or "vision") has its sizes from a preset."""
    return recipe_from_dict(BASE | {"model": BASE["model"] | {part: {"preset": name}}}, overrides=overrides)


def presets(part: str) -> dict[str, dict[str, Any]]:
    """The presets' own values; YAML takes a number such as 1e-5 for text."""
    raw = yaml.safe_load((PRESET_DIR / f"{part}.yaml").read_text())
    return {name: sizes | {"norm_eps": float(sizes["norm_eps"])} for name, sizes in raw.items()}


def test_precedence_default_preset_file_override() -> None:
    raw = copy.deepcopy(BASE)
    raw["model"]["language"] = {"preset": "tiny-llama"}
    preset, default = presets("language")["tiny-llama"], LanguageConfig()
    assert recipe_from_dict(raw).model.language == LanguageConfig(preset="tiny-llama", **preset)
    assert preset["hidden_size"] not in (default.hidden_size, 64, 256)  # preset over default
    raw["model"]["language"]["hidden_size"] = 64
    assert recipe_from_dict(raw).model.language.hidden_size == 64  # file over preset
    over = recipe_from_dict(raw, overrides=["--model.language.hidden_size=256"])
    assert over.model.language.hidden_size == 256
    assert raw["model"]["language"]["hidden_size"] == 64  # the input is left alone


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("--optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("training.steps=2e3", "training.steps", 2000),
        ("training.freeze=[vision, language]", "training.freeze", ["vision", "language"]),
        ("training.freeze=[]", "training.freeze", []),
        ("optimizer.decay_steps=null", "optimizer.decay_steps", None),
        ("--parallel.distributed_optimizer=false", "parallel.distributed_optimizer", False),
        ("--resume.strict", "resume.strict", True),
        ("name=13", "name", "13"),
        ("name=a=b", "name", "a=b"),
        ("data.train=null", "data.train", None),
        ("data.train=runs/1e5", "data.train", "runs/1e5"),
        ("data.image.mean=[0, 0.5, 1]", "data.image.mean", [0.0, 0.5, 1.0]),
    ],
)
def test_overrides(override: str, key: str, value: Any) -> None:
    node: Any = make(override)
    for part in key.split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


def test_round_trip_and_hash(tmp_path: Path) -> None:
    odd = ["name=1e-3", "stage=null-ish", "run_dir=yes", "optimizer.eps=1e-12", "training.freeze=[vision]"]
    recipe = with_preset("language", "tiny-llama", *odd)
    path = tmp_path / "dump.yaml"
    path.write_text(recipe_to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert recipe_hash(load_recipe(path)) == recipe_hash(recipe)
    assert recipe_hash(make("seed=2")) != recipe_hash(make("seed=1"))


@settings(max_examples=60, deadline=None)
@given(
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=12),
    lr=st.floats(min_value=1e-12, max_value=1e3),
    steps=st.integers(min_value=1, max_value=2**62),
)
def test_round_trip_of_any_value(tmp_path_factory: pytest.TempPathFactory, name: str, lr: float, steps: int):
    raw = BASE | {"name": name, "optimizer": {"lr": lr}, "training": {"steps": steps}}
    recipe = recipe_from_dict(raw)
    path = tmp_path_factory.mktemp("dump") / "r.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_dump_has_every_key() -> None:
    tree = yaml.safe_load(recipe_to_yaml(make()))
    for key in valid_keys():
        node = tree
        for part in key.split("."):
            assert part in node, key
            node = node[part]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {lr: 1}", ["training.lr", "unknown key", "optimizer.lr"]),
        ("trainin: {steps: 1}", ["unknown key trainin"]),
        ("model: {visoin: {width: 4}}", ["model.visoin", "model.vision"]),
        ("model: 3", ["model is a section, not 3"]),
        ("model: {language: {preset: lama-7b}}", ["lama-7b", "did you mean", "vicuna-13b"]),
        ("seed: 1\nseed: 2", ["line 2", "'seed' stands twice"]),
        ("model:\n  vision: {width: 1, width: 2}", ["line 2", "'width' stands twice"]),
        ("[1, 2]", ["a recipe is a mapping"]),
        ("", ["a recipe is a mapping"]),
        ("a: [", ["correct the YAML"]),
        ("? [a]\n: b", ["a key must be a word"]),
        ("a: &x [*x]", ["unknown key a"]),
        ("x: !!python/object/apply:os.system [true]", ["correct the YAML"]),
        ("stage: train", ["name is missing"]),
        ("[" * 5000, ["correct it"]),
        ("seed: " + "9" * 5000, ["correct it"]),
    ],
)
def test_messages_name_file_key_and_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "bad.yaml" in message
    assert "\n" not in message and len(message) < 450
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {steps: 3.5}", ["training.steps is 3.5", "whole number"]),
        ("training: {steps: '3'}", ["training.steps is '3'", "whole number"]),
        ("training: {steps: null}", ["training.steps is empty (null)", "whole number"]),
        ("training: {steps: true}", ["training.steps is true"]),
        ("optimizer: {lr: .inf}", ["optimizer.lr", "a number"]),
        ("optimizer: {lr: 1e999}", ["optimizer.lr", "a number"]),
        ("parallel: {sequence: yes}", ["parallel.sequence is 'yes'", "true or false"]),
        ("parallel: {backend: foo}", ["parallel.backend is 'foo'", "auto, te, local"]),
        ("training: {freeze: vision}", ["training.freeze is 'vision'", "a list"]),
        ("training: {freeze: [vison]}", ["training.freeze", "vision, connector"]),
        ("tokenizer: t\nname: 12\nrun_dir: r", ["name is 12", "text (quoted)"]),
        ("tokenizer: t\nrun_dir: &x [*x]\nname: n", ["run_dir is [", "text (quoted)"]),
        ("name: " + "{a: " * 300 + "1" + "}" * 300 + "\nrun_dir: r", ["name is {'a'"]),
    ],
)
def test_messages_of_wrong_types(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text if "name:" in text else HEAD + text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert "bad.yaml" in message and "it must be" in message
    assert "\n" not in message and len(message) < 450
    for part in parts:
        assert part in message


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.text("{}[]:,&*!|>'\"-?#% \n\tab1.~<", max_size=60)))
def test_any_text_gives_our_errors_only(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "r.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        load_recipe(path)


@pytest.mark.parametrize("data", [b"\xff\xfe\x00a", b"\x00" * 10, b"a" * (1 << 20) + b"a"])
def test_files_that_are_no_recipes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"r\.yaml"):
        load_recipe(path)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="give the path of a recipe file"):
            load_recipe(path)


@pytest.mark.parametrize(
    "override",
    [
        *("lr", "--lr=3", "model=3", "=3", "model.language.num_layers", "training.freeze=["),
        *("resume.strict", "--training.steps", "--optimizer.decay_steps", "--resume", "--data.train", "--"),
    ],
)
def test_bad_overrides(override: str) -> None:
    with pytest.raises(InputError, match="override"):
        make(override)


def test_what_cannot_stand_alone_says_what_it_takes() -> None:
    with pytest.raises(
        InputError, match=r"true or false may stand alone; write it with '=' and a whole number"
    ):
        make("--training.steps")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = make("run_dir=~/runs", "data.train=~/data", "training.init_from=a/~b")
    assert (recipe.run_dir, recipe.data.train) == ("/home/ada/runs", "/home/ada/data")
    assert recipe.training.init_from == "a/~b"
    assert recipe.tokenizer == "tokenizer"  # relative paths stay relative to the current directory


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["training.steps=0"], ["training.steps: 0 is not positive"]),
        (["optimizer.lr=-1"], ["optimizer.lr", "not positive"]),
        (["checkpoint.interval=-1"], ["checkpoint.interval: -1 is negative"]),
        (["data.max_images=-1"], ["data.max_images: -1 is negative"]),
        (["model.language.num_kv_heads=0"], ["num_kv_heads: 0"]),
        (["model.language.num_kv_heads=3"], ["num_heads: 4 is not divisible", "3"]),
        (["model.language.num_heads=3"], ["hidden_size: 128 is not divisible", "129"]),
        (["model.language.hidden_size=12"], ["= 3 is odd"]),
        (["model.vision.image_size=33"], ["image_size: 33", "patch_size 8", "40"]),
        (["model.vision.feature_layer=-6"], ["feature_layer: -6", "-5 to 4"]),
        (["model.connector.kind=resampler"], ["resampler does not fit", "merged", "use mlp"]),
        ([*FLAMINGO, "model.connector.kind=mlp"], ["use resampler"]),
        ([*FLAMINGO, "model.cross_attention.every=5"], ["every: 5", "4 layers"]),
        (
            [*FLAMINGO, "model.cross_attention.num_heads=3", "parallel.tensor=2"],
            ["cross_attention.num_heads"],
        ),
        ([*FLAMINGO, "model.connector.num_heads=3", "parallel.tensor=2"], ["connector.num_heads: 3"]),
        (["parallel.tensor=3"], ["num_heads: 4 is not divisible by parallel.tensor 3"]),
        (["parallel.tensor=2", "model.language.num_kv_heads=1"], ["num_kv_heads: 1"]),
        (["parallel.tensor=4", "model.language.ffn_hidden_size=342"], ["ffn_hidden_size: 342"]),
        (["parallel.pipeline=3"], ["num_layers: 4 is not divisible by parallel.pipeline 3"]),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=4"], ["= 8"]),
        (["parallel.virtual_pipeline=2"], ["needs parallel.pipeline above 1"]),
        (["parallel.pipeline=2", "parallel.pipeline_layout=Ett|ttt"], ["'Ett|ttt'", "t*N (layers)"]),
        (
            ["parallel.pipeline=2", "parallel.pipeline_layout=Ett|t|tL"],
            ["has 3 stages", "separate 2 of them"],
        ),
        (["parallel.pipeline=2", "parallel.pipeline_layout=Et*2|t*3L"], ["has 5 layers", "num_layers is 4"]),
        (["parallel.context=2", "data.sequence_length=126"], ["126 is not divisible", "128"]),
        (["parallel.sequence=true"], ["parallel.tensor above 1"]),
        (
            [*FLAMINGO, "parallel.tensor=2", "parallel.sequence=true", "model.connector.num_latents=7"],
            ["num_latents: 7 is not divisible by parallel.tensor 2"],
        ),
        (
            ["parallel.sequence=true", "parallel.tensor=2", "data.sequence_length=127"],
            ["sequence_length: 127", "parallel.tensor 2", "128"],
        ),
        (["data.sequence_length=16"], ["16 positions of one image"]),
        (["data.sequence_length=513", "model.language.max_positions=512"], ["max_positions 512"]),
        (["training.global_batch_size=10", "training.micro_batch_size=4"], ["10", "4", "12"]),
        (["data.pack=true", "parallel.context=2"], ["data.pack", "parallel.context 2"]),
        (["training.freeze=[vision, connector, language]"], ["every part is frozen"]),
        (
            [*FLAMINGO, "training.freeze=[vision, connector, language, cross_attention]"],
            ["every part is frozen"],
        ),
        (["training.freeze=[cross_attention]"], ["does not have"]),
        (["optimizer.beta2=1.0"], ["optimizer.beta2", "[0, 1)"]),
        (["data.max_bad_images=2"], ["data.max_bad_images"]),
        (["data.image.mean=[0.5]"], ["data.image.mean: 1 values"]),
        (["data.image.std=[1, 0, 1]"], ["data.image.std"]),
        (["data.image.random_crop_scale=0"], ["random_crop_scale"]),
        (["optimizer.min_lr=1"], ["optimizer.min_lr: 1 is above optimizer.lr 0.001"]),
        (["run_dir="], ["run_dir"]),
    ],
)
def test_validation(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        make(*overrides)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("part", ["language", "vision"])
def test_sizes_must_come_from_somewhere(part: str) -> None:
    name, size = {"language": ("tiny-llama", "num_layers"), "vision": ("tiny-vit", "image_size")}[part]
    with pytest.raises(InputError) as caught:
        with_preset(part, name, f"model.{part}.preset=null")
    assert f"model.{part}.{size}: is 0" in str(caught.value)
    assert f"model.{part}.preset" in str(caught.value)


def test_warnings() -> None:
    assert validate(make()) == []
    warm = validate(make("optimizer.warmup_steps=1000", "training.steps=290"))
    assert len(warm) == 1 and "1000 steps of warm-up" in warm[0] and "0.00029" in warm[0]
    assert (
        validate(make("optimizer.warmup_steps=1000", "optimizer.decay_steps=1001", "training.steps=900"))
        == []
    )
    assert "init_from" in validate(make("training.freeze=[vision]"))[0]
    assert validate(make("training.freeze=[vision]", "training.init_from=ckpt")) == []


def test_world() -> None:
    recipe = make("parallel.tensor=2", "parallel.pipeline=2", "training.global_batch_size=12")
    assert validate_world(recipe, 4) == 1
    assert validate_world(recipe, 12) == 3
    with pytest.raises(InputError, match=r"= 4 does not divide the 6 processes"):
        validate_world(recipe, 6)
    with pytest.raises(InputError, match=r"12 is not a multiple .* = 5; the next size that fits is 15"):
        validate_world(recipe, 20)
    interleaved = make("parallel.pipeline=2", "parallel.virtual_pipeline=2", "training.global_batch_size=3")
    with pytest.raises(InputError, match="3 micro-batches"):
        validate_world(interleaved, 2)


def language_parameters(name: str) -> int:
    m = with_preset("language", name).model.language
    kv = (m.num_kv_heads or m.num_heads) * m.head_dim
    attention = m.hidden_size * (2 * m.hidden_size + 2 * kv)
    biases = m.qkv_bias * (m.hidden_size + 2 * kv) + m.out_bias * m.hidden_size
    layer = attention + biases + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    return m.num_layers * layer + m.hidden_size + 2 * m.vocab_size * m.hidden_size


def vision_parameters(name: str) -> int:
    room = ["data.sequence_length=700", "model.language.max_positions=700"]
    v = with_preset("vision", name, *room).model.vision
    block = 4 * v.width**2 + 4 * v.width + 2 * v.width * v.mlp_width + v.mlp_width + v.width + 4 * v.width
    embeddings = 3 * v.patch_size**2 * v.width + v.width + (v.num_patches + 1) * v.width
    return v.num_layers * block + embeddings + 4 * v.width


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama2-7b", 6_738_415_616),
        ("vicuna-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("vicuna-13b", 13_015_864_320),
        ("llama-65b", 65_285_660_672),
        ("zephyr-7b", 7_241_732_096),
        ("internlm-7b", 7_321_948_160),
    ],
)
def test_language_presets_have_the_published_size(name: str, published: int) -> None:
    assert language_parameters(name) == published


@pytest.mark.parametrize(
    ("name", "published", "projection"),
    [
        ("clip-vit-l-14", 303_179_776, 0),
        ("clip-vit-l-14-336", 303_507_456, 0),
        ("openclip-vit-h-14", 632_076_800, 1280 * 1024),  # OpenCLIP's figures hold the output projection
        ("openclip-vit-g-14", 1_012_645_632, 1408 * 1024),
        ("openclip-vit-bigg-14", 1_844_907_264, 1664 * 1280),
    ],
)
def test_vision_presets_have_the_published_size(name: str, published: int, projection: int) -> None:
    assert vision_parameters(name) + projection == published


def test_every_preset_loads() -> None:
    assert len(presets("language")) >= 8 and len(presets("vision")) >= 6
    room = ["data.sequence_length=1024", "model.language.max_positions=1024"]
    for part in ("language", "vision"):
        for name, sizes in presets(part).items():
            loaded = getattr(with_preset(part, name, *room).model, part)
            for key in sizes.keys() - {"max_positions"}:
                assert getattr(loaded, key) == sizes[key], (name, key)


def test_every_example_recipe_loads() -> None:
    recipes = [p for p in (ROOT / "examples").rglob("*.yaml")]
    assert recipes
    for path in recipes:
        load_recipe(path)


def test_the_recipes_in_the_documentation_load(tmp_path: Path) -> None:
    """A whole one, and parts that may stand in it."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/data.md", "docs/training.md")]
    blocks = [part.split("```")[0] for text in texts for part in text.split("```yaml\n")[1:]]
    path = tmp_path / "whole.yaml"
    path.write_text(next(block for block in blocks if "name: my-llava" in block))
    assert validate(load_recipe(path)) == []
    whole = load_recipe(ROOT / "examples" / "flamingo_65b" / "pretrain.yaml")  # an image takes one position
    parts = [block for block in blocks if "name: my-llava" not in block]
    assert len(parts) == 3
    all_trained = asdict(replace(whole, training=replace(whole.training, freeze=[])))
    for part in parts:
        others = {key: value for key, value in all_trained.items() if key not in yaml.safe_load(part)}
        path.write_text(yaml.safe_dump(others) + part)
        assert validate(load_recipe(path)) == []
