"""LLaVA as its authors publish it: there and back, with the encoder or without; the projector's own file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from megamm.config import ImageConfig, LanguageConfig, ModelConfig, VisionConfig
from megamm.convert import export_checkpoint, import_checkpoint
from megamm.convert.engine import write_json
from megamm.convert.families import FAMILIES, recognise
from megamm.convert.family import Found
from megamm.convert.files import SourceFiles
from megamm.convert.tables import llava_original
from megamm.data.tokenizer import MODEL_FILE, Tokenizer
from megamm.engine import groups
from megamm.engine.checkpoint import read_recipe, read_weights
from megamm.errors import InputError
from megamm.inference import load
from tests.convert.families import target
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
from tests.convert.llava_original import (
    PUBLISHED,
    TEXT_VOCAB,
    TOWER,
    original_keys,
    random_model,
    save_clip,
    save_original,
)


@pytest.fixture(scope="module", autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return random_model()


@pytest.fixture(scope="module")
def sources(theirs: nn.Module, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The usual pair: a directory without its encoder, and the encoder. Not to be changed."""
    root = tmp_path_factory.mktemp("original")
    return [save_original(theirs, root / "llava", tokenizer), save_clip(theirs, root / "clip")]


@pytest.fixture(scope="module")
def imported(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_checkpoint(sources, tmp_path_factory.mktemp("imported") / "checkpoint")


# --- there and back -----------------------------------------------------------------------------------

VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "plain": random_model,
    "bf16": lambda: random_model().bfloat16(),
    "mistral": lambda: random_model(sliding_window=64, rope_theta=5e5),
    "multi-head": lambda: random_model(num_key_value_heads=4),
    "padded vocabulary": lambda: random_model(vocab_size=VOCAB_SIZE + 13),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(variant: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """An encoder of its own (clip directory), then the export alone, whose files hold it."""
    model = VARIANTS[variant]()
    source = save_original(model, tmp_path / "llava", tokenizer)
    clip = save_clip(model, tmp_path / "clip")
    first = import_checkpoint([clip, source], tmp_path / "first")
    out = export_checkpoint(first, tmp_path / "out", "llava_original", max_shard_bytes=30_000).out
    assert len(list(out.glob("*.safetensors"))) > 1
    tensors = original_keys(model)
    assert_bitwise_equal(read_tensors(out), tensors)
    projector = torch.load(out / "mm_projector.bin", weights_only=True)
    assert_bitwise_equal(projector, {key: x for key, x in tensors.items() if "mm_projector" in key})
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (source, out))
    own = {"mm_vision_tower": "vision_tower", "tune_mm_mlp_adapter": None}
    own["model_type"] = "llava_mistral" if variant == "mistral" else "llava_llama"
    assert {key: ours.get(key) for key in theirs} == theirs | own
    second = import_checkpoint([out], tmp_path / "second")
    assert_bitwise_equal(read_weights(second), read_weights(first))
    assert read_recipe(second).model == read_recipe(first).model
    assert read_recipe(second).data.image == read_recipe(first).data.image


def test_an_encoder_in_the_files(theirs: nn.Module, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Nothing says its sizes but the recipe, which may ask for a larger image."""
    source = save_original(theirs, tmp_path / "llava", tokenizer, has_tower=True, mm_vision_tower="mine")
    with pytest.raises(InputError, match=r"mm_vision_tower is 'mine', which does not say .* give a --recipe"):
        import_checkpoint([source], tmp_path / "none")
    small = save_original(theirs, tmp_path / "small", tokenizer)
    clip = save_clip(theirs, tmp_path / "clip")
    model = read_recipe(import_checkpoint([small, clip], tmp_path / "parts")).model
    recipe = recipe_for(replace(model, image_token_id=None))
    checkpoint = import_checkpoint([source], tmp_path / "checkpoint", recipe)
    assert_bitwise_equal(read_weights(checkpoint), read_weights(tmp_path / "parts"))
    # here the tokenizer alone says which row to leave out
    assert read_recipe(checkpoint).model.image_token_id is None
    out = export_checkpoint(checkpoint, tmp_path / "out", "llava_original").out
    assert_bitwise_equal(read_tensors(out), original_keys(theirs))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == TEXT_VOCAB
    with pytest.raises(InputError, match="both hold a vision model"):
        import_checkpoint([source, clip], tmp_path / "none", recipe)
    recipe.model = replace(model, vision=replace(model.vision, image_size=42, weights_image_size=28))
    larger = read_weights(import_checkpoint([source], tmp_path / "larger", recipe))
    assert larger["vision.position_embedding"].shape == (10, 16)


def test_the_placeholder_has_the_row_that_is_added_and_dropped(
    imported: Path, theirs: nn.Module, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    recipe = read_recipe(imported)
    assert recipe.model.language.vocab_size == VOCAB_SIZE and recipe.data.image == ImageConfig(fit="pad")
    assert Tokenizer.load(imported / "tokenizer").image_id == TEXT_VOCAB
    weights = read_weights(imported)
    for ours, key in (("embedding.word_embeddings", "model.embed_tokens"), ("output_layer", "lm_head")):
        rows = original_keys(theirs)[f"{key}.weight"]
        found = weights[f"language.{ours}.weight"]
        assert torch.equal(found[:-1], rows)
        torch.testing.assert_close(found[-1], rows.double().mean(0).float(), atol=1e-7, rtol=0)
    out = export_checkpoint(imported, tmp_path / "out", "llava_original").out
    words = AutoTokenizer.from_pretrained(out)
    text = "describe this picture -- please"
    assert len(words) == TEXT_VOCAB == json.loads((out / "config.json").read_text())["vocab_size"]
    assert words(text).input_ids == tokenizer.encode(text, bos=True)


def test_the_numbers_are_those_of_the_original(imported: Path, theirs: nn.Module, tmp_path: Path) -> None:
    """The authors put features between embeddings, with no token for them; so does ours, so does llava-hf."""
    from transformers import LlavaForConditionalGeneration

    ids = torch.randint(3, TEXT_VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 3:7] = TEXT_VOCAB  # <image>
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        hidden = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        features = theirs.model.multi_modal_projector(hidden)
        text = theirs.get_input_embeddings()
        spliced = torch.cat([text(ids[:, :3]), features, text(ids[:, 7:])], dim=1)
        wanted = theirs.lm_head(theirs.model.language_model(inputs_embeds=spliced).last_hidden_state)
    found = load(imported, "cpu").logits(ids, pixels)
    torch.testing.assert_close(found[..., :TEXT_VOCAB], wanted, atol=1e-5, rtol=1e-5)

    out = export_checkpoint(imported, tmp_path / "out", "llava").out
    model, info = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and model.config.image_token_id == TEXT_VOCAB
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits[..., :TEXT_VOCAB], wanted, atol=1e-5, rtol=1e-5)
    assert logits.isfinite().all()


def test_without_a_tokenizer(theirs: nn.Module, tmp_path: Path) -> None:
    """The placeholder gets the next id, so that weights and configuration are enough."""
    source = save_original(theirs, tmp_path / "llava", None)
    clip = save_clip(theirs, tmp_path / "clip")
    checkpoint = import_checkpoint([source, clip], tmp_path / "checkpoint")
    model = read_recipe(checkpoint).model
    assert (model.language.vocab_size, model.image_token_id) == (VOCAB_SIZE, TEXT_VOCAB)
    out = export_checkpoint(checkpoint, tmp_path / "out", "llava_original").out
    assert_bitwise_equal(read_tensors(out), original_keys(theirs))
    hub = export_checkpoint(checkpoint, tmp_path / "hub").out
    assert json.loads((hub / "config.json").read_text())["image_token_index"] == TEXT_VOCAB


def test_a_placeholder_within_the_vocabulary_stays(
    llava_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """As in llava-hf's vocabularies, which are padded behind `<image>`: no row can be left out."""
    model = hf_llava(text=dict(vocab_size=VOCAB_SIZE + 13))
    save_hf(model, Tokenizer.load(tokenizer_dir), tmp_path / "hf")
    checkpoint = import_checkpoint([tmp_path / "hf"], tmp_path / "checkpoint")
    out = export_checkpoint(checkpoint, tmp_path / "out", "llava_original").out
    assert_bitwise_equal(read_tensors(out), original_keys(model))
    again = export_checkpoint(import_checkpoint([out], tmp_path / "again"), tmp_path / "back", "llava").out
    assert_bitwise_equal(read_tensors(again), hub_layout(read_tensors(tmp_path / "hf")))


# --- the projector alone ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(theirs: nn.Module, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder and an encoder, each in a directory of its own."""
    from transformers import LlamaForCausalLM

    root = tmp_path_factory.mktemp("parts")
    decoder = LlamaForCausalLM(theirs.config.text_config)
    decoder.model.load_state_dict(theirs.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(theirs.lm_head.state_dict())
    decoder.save_pretrained(root / "vicuna")
    (root / "vicuna" / MODEL_FILE).write_bytes(tokenizer.model)
    save_clip(theirs, root / "clip")
    return root


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_projector_of_the_first_stage(
    prefix: str, parts: Path, imported: Path, theirs: nn.Module, tmp_path: Path
) -> None:
    projector = {key: x for key, x in original_keys(theirs).items() if "mm_projector" in key}
    file = tmp_path / "mm_projector.bin"
    torch.save({prefix + key.removeprefix("model."): x for key, x in projector.items()}, file)
    sources = [parts / "vicuna", parts / "clip", file]
    recipe = recipe_for(read_recipe(imported).model)
    whole = import_checkpoint(sources, tmp_path / "checkpoint", recipe)
    assert_bitwise_equal(read_weights(whole), read_weights(imported))
    with pytest.raises(InputError, match=r"--recipe: needed with .*mm_projector\.bin"):
        import_checkpoint(sources, tmp_path / "none")
    recipe.model.language = replace(recipe.model.language, hidden_size=64)
    with pytest.raises(InputError, match=r"mm_projector\.0\.weight has shape \[32, 16\]"):
        import_checkpoint(sources, tmp_path / "none", recipe)


def test_the_written_projector_is_such_a_file(parts: Path, imported: Path, tmp_path: Path) -> None:
    out = export_checkpoint(imported, tmp_path / "out", "llava_original").out
    sources = [parts / "vicuna", parts / "clip", out / "mm_projector.bin"]
    whole = import_checkpoint(sources, tmp_path / "checkpoint", read_recipe(imported))
    assert_bitwise_equal(read_weights(whole), read_weights(imported))


# --- configuration ------------------------------------------------------------------------------------


def test_what_the_configuration_says_of_features_and_images(
    theirs: nn.Module, sources: list[Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    changes = dict(mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch", image_aspect_ratio=None)
    source = save_original(theirs, tmp_path / "llava", tokenizer, **changes)
    clip = save_clip(theirs, tmp_path / "clip")
    square = {"height": 28, "width": 28}
    values = {"size": {"shortest_edge": 28}, "crop_size": square, "image_mean": [0.5, 0.4, 0.3]}
    write_json(clip / "preprocessor_config.json", values)
    checkpoint = import_checkpoint([source, clip], tmp_path / "checkpoint")
    recipe = read_recipe(checkpoint)
    vision = recipe.model.vision
    assert (vision.feature_layer, vision.feature_select, vision.feature_norm) == (-1, "all", False)
    assert recipe.data.image == ImageConfig(mean=[0.5, 0.4, 0.3])
    # what the directory says, a recipe may not contradict
    recipe.model.vision = replace(vision, feature_layer=-2)
    with pytest.raises(InputError, match="feature_layer is -2 in the recipe and -1 in the sources"):
        import_checkpoint([source, clip], tmp_path / "none", recipe)
    # the other image values are kept where an encoder is described
    out = export_checkpoint(checkpoint, tmp_path / "out", "llava_original").out
    config = json.loads((out / "config.json").read_text())
    assert {key: config[key] for key in changes} == changes | {"image_aspect_ratio": "square"}
    assert read_recipe(import_checkpoint([out], tmp_path / "again")).data.image == recipe.data.image


def full_size(**changes: Any) -> ModelConfig:
    """LLaVA-1.5 13B."""
    vision = VisionConfig(
        image_size=336, patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096
    )
    language = LanguageConfig(
        num_layers=40, hidden_size=5120, num_heads=40, ffn_hidden_size=13824, vocab_size=32001
    )
    return ModelConfig(language=language, vision=replace(vision, **changes), image_token_id=32000)


class Keys:
    """A source with nothing but names."""

    def __init__(self, names: list[str]) -> None:
        self._names = names

    def keys(self) -> list[str]:
        return self._names


@pytest.mark.parametrize(("size", "name"), [(336, PUBLISHED), (224, "openai/clip-vit-large-patch14")])
def test_the_published_encoders_are_known_by_name(size: int, name: str, tmp_path: Path) -> None:
    import yaml

    from megamm.recipe import PRESET_DIR

    model, export = full_size(image_size=size, feature_layer=-3), llava_original.FAMILY.export
    assert export is not None and export.config is not None
    config = export.config(target(tmp_path, model, image_id=32000))
    assert (config["mm_vision_tower"], config["vocab_size"]) == (name, 32000)
    export.extras(target(tmp_path, model, image_id=32000))
    assert not list(tmp_path.iterdir())
    goal = target(tmp_path, model, image_id=32000)
    goal.recipe.data.image = ImageConfig(mean=[0.5, 0.5, 0.5])  # not those that come with the name
    assert export.config(goal)["mm_vision_tower"] == "vision_tower"
    config["mm_vision_tower"] = f"/data/{name}/"  # a copy of it
    keys = list(llava_original.table(model).their_keys())
    reading = llava_original.FAMILY.read(Found(tmp_path, config, Keys(keys)), None)  # type: ignore[arg-type]
    assert reading.model.vision == model.vision
    preset = "clip-vit-l-14" + "-336" * (size == 336)
    values = yaml.safe_load((PRESET_DIR / "vision.yaml").read_text())[preset]
    assert replace(model.vision, feature_layer=-2) == VisionConfig(**{**values, "norm_eps": 1e-5})


def test_the_published_13b_has_its_number_of_weights() -> None:
    table = llava_original.table(full_size())
    shapes = [shape for rule in table.rules for shape in rule.their_shapes()]
    assert sum(torch.Size(shape).numel() for shape in shapes) == 13_350_839_296


def test_an_encoder_of_another_kind_is_described(imported: Path, tmp_path: Path) -> None:
    report = export_checkpoint(imported, tmp_path / "out", "llava_original")
    config = json.loads((report.out / "config.json").read_text())
    assert config["mm_vision_tower"] == "vision_tower" and config["unfreeze_mm_vision_tower"] is True
    assert not any(key.startswith(("tune_", "freeze_")) for key in config)
    described = {path.name for path in (report.out / "vision_tower").iterdir()}
    assert described == {"config.json", "preprocessor_config.json"}
    assert any("does not know this encoder by name" in note for note in report.notes)


def test_squashed_images_are_mentioned(tmp_path: Path) -> None:
    export, goal = llava_original.FAMILY.export, target(tmp_path, full_size(), image_id=32000)
    assert export is not None and export.config is not None
    goal.recipe.data.image = ImageConfig(fit="squash")
    assert export.config(goal)["image_aspect_ratio"] == "square"
    assert any("squashed" in note for note in goal.notes)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(mm_projector_type="linear"),
            "mm_projector_type is 'linear', megamm supports only 'mlp2x_gelu'",
        ),
        (dict(mm_projector_type=None), "mm_projector_type is 'linear'"),
        (dict(mm_use_im_start_end=True), "mm_use_im_start_end is True"),
        (dict(image_aspect_ratio="anyres"), "image_aspect_ratio is 'anyres'"),
        (dict(mm_patch_merge_type="spatial_unpad"), "mm_patch_merge_type is 'spatial_unpad'"),
        (dict(mm_resampler_type="perceiver"), "mm_resampler_type is 'perceiver'"),
        (dict(s2=True), "s2 is True"),
        (dict(mm_vision_select_layer=[-2, -5]), r"mm_vision_select_layer is \[-2, -5\]"),
        (dict(mm_vision_select_layer=-9), "feature_layer"),
        (dict(mm_vision_select_feature="cls"), "mm_vision_select_feature is 'cls'"),
        (dict(mm_hidden_size=None), "mm_hidden_size is None"),
        (dict(mm_hidden_size=24), r"mm_projector\.0\.weight has shape \[32, 16\]"),
        (dict(model_type="llava_mpt"), "model_type is 'llava_mpt'"),
        (dict(vocab_size=400), r"has shape \[419, 32\]"),
    ],
)
def test_configurations_that_are_refused(
    changes: dict[str, Any], message: str, sources: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "llava"
    copy.mkdir()
    for path in sources[0].iterdir():
        (copy / path.name).symlink_to(path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").unlink()
    write_json(copy / "config.json", config)
    edit_config(copy, lambda values: values.update(changes))
    with pytest.raises(InputError, match=message) as caught:
        import_checkpoint([copy, sources[1]], tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_sources_that_do_not_belong_together(theirs: nn.Module, sources: list[Path], tmp_path: Path) -> None:
    wide = save_clip(theirs, tmp_path / "wide", hidden_size=24)
    with pytest.raises(InputError, match=r"features of width 16, but those of .*wide have 24"):
        import_checkpoint([sources[0], wide], tmp_path / "out")
    with pytest.raises(InputError, match="no vision model among the sources"):
        import_checkpoint(sources[:1], tmp_path / "out")
    published = save_original(theirs, tmp_path / "published", None, has_tower=True)
    with pytest.raises(InputError, match="mm_hidden_size is 16, but the encoder has a width of 1024"):
        import_checkpoint([published], tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_every_key_is_accounted_for(
    change: str, theirs: nn.Module, sources: list[Path], tmp_path: Path
) -> None:
    source = save_original(theirs, tmp_path / "llava", None)
    tensors = {key: x for key, x in original_keys(theirs).items() if not key.startswith(TOWER)}
    for path in source.glob("pytorch_model*"):
        path.unlink()
    if change == "missing":
        del tensors["model.mm_projector.2.bias"]
    else:
        tensors["model.image_newline"] = torch.ones(32)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        InputError, match="1 missing .*mm_projector" if change == "missing" else "1 unknown .*newline"
    ):
        import_checkpoint([source, sources[1]], tmp_path / "out")


def test_each_configuration_has_its_family(llava_dir: Path, sources: list[Path]) -> None:
    for directory, family in ((llava_dir, "llava"), (sources[0], "llava_original")):
        config = json.loads((directory / "config.json").read_text())
        assert config["model_type"] == "llava"
        found = Found(directory, config, SourceFiles(directory))
        assert recognise(found).name == family  # in any order
        assert [known.name for known in FAMILIES if known.recognises(found)] == [family]
