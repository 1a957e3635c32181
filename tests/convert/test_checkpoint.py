"""Hugging Face directory -> checkpoint -> Hugging Face directory, and models put together from parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamm.convert import export_checkpoint, import_checkpoint, import_llava
from megamm.convert.importing import import_sources
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.engine.checkpoint import read_recipe, read_weights
from megamm.errors import InputError
from megamm.models.initialization import weight_drawer
from tests.convert.helpers import (
    VOCAB_SIZE,
    assert_bitwise_equal,
    edit_config,
    hf_llava,
    hub_layout,
    read_tensors,
    recipe_for,
)


def test_there_and_back_through_a_checkpoint(llava_dir, tokenizer, tmp_path):
    checkpoint = import_checkpoint([llava_dir], tmp_path / "checkpoint")
    assert_bitwise_equal(read_weights(checkpoint), dict(import_llava(llava_dir).tensors))
    assert read_recipe(checkpoint).model == import_llava(llava_dir).model
    assert Tokenizer.load(checkpoint / "tokenizer").sha256 == tokenizer.sha256
    report = export_checkpoint(checkpoint, tmp_path / "out")
    assert_bitwise_equal(read_tensors(report.out), hub_layout(read_tensors(llava_dir)))
    again = import_checkpoint([report.out], tmp_path / "again")
    assert_bitwise_equal(read_weights(again), read_weights(checkpoint))
    assert read_recipe(again).model == read_recipe(checkpoint).model


def test_an_empty_directory_may_be_filled_a_full_one_not(llava_dir, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    import_checkpoint([llava_dir], empty)
    export_checkpoint(empty, tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        import_checkpoint([llava_dir], empty)
    with pytest.raises(InputError, match="already exists"):
        export_checkpoint(empty, tmp_path / "out")
    with pytest.raises(InputError, match="there is no 'blip'"):
        export_checkpoint(empty, tmp_path / "other", family="blip")


def test_a_recipe_is_kept_and_every_difference_named(llava_dir, tmp_path):
    recipe = recipe_for(import_llava(llava_dir).model)
    recipe.name = "mine"
    recipe.model.language.init_std = 0.01  # without effect on the weights
    checkpoint = import_checkpoint([llava_dir], tmp_path / "checkpoint", recipe)
    assert read_recipe(checkpoint).name == "mine" and read_recipe(checkpoint).model.language.init_std == 0.01
    language = replace(recipe.model.language, num_layers=3, rope_theta=5e5)
    vision = replace(recipe.model.vision, feature_layer=-1)
    wrong = replace(recipe, model=replace(recipe.model, language=language, vision=vision))
    with pytest.raises(InputError) as caught:
        import_checkpoint([llava_dir], tmp_path / "other", wrong)
    message = str(caught.value)
    assert "model.language.num_layers is 3 in the recipe and 2 in the sources" in message
    assert "model.language.rope_theta is 500000.0 in the recipe and 10000.0 in the sources" in message
    assert "model.vision.feature_layer is -1 in the recipe and -2 in the sources" in message
    assert not (tmp_path / "other").exists()


def test_image_settings_come_along(llava_dir, tokenizer_dir, tmp_path):
    """Without a recipe the checkpoint says how the source prepares images."""
    from megamm.config import ImageConfig
    from megamm.convert import export_llava

    image = ImageConfig(fit="squash", mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    found = import_llava(llava_dir)
    export_llava(found.tensors, recipe_for(found.model, image), tokenizer_dir, tmp_path / "out")
    checkpoint = import_checkpoint([tmp_path / "out"], tmp_path / "checkpoint")
    assert read_recipe(checkpoint).data.image == image


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> tuple[Path, Path]:
    """A decoder that does not know `<image>`, and a whole CLIP model."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, LlamaForCausalLM

    llava = hf_llava(text=dict(vocab_size=VOCAB_SIZE - 1))
    root = tmp_path_factory.mktemp("parts")
    LlamaForCausalLM(llava.config.text_config).save_pretrained(root / "llm")
    shutil.copy(tokenizer_dir / "tokenizer.model", root / "llm")
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=llava.config.vision_config.to_dict(), projection_dim=4
    )
    CLIPModel(config).save_pretrained(root / "clip")
    return root / "llm", root / "clip"


def parts_recipe(parts):
    llm, clip = (import_part(directory) for directory in parts)
    model = replace(llm.model, vision=clip.model.vision)
    model.language = replace(model.language, vocab_size=VOCAB_SIZE)
    return recipe_for(model)


def import_part(directory):
    from megamm.convert.sources import open_sources

    return open_sources([directory])[0]


def test_a_model_from_a_decoder_and_a_clip_encoder(parts, tmp_path):
    recipe = parts_recipe(parts)
    recipe.seed = 5
    for order in (parts, parts[::-1]):
        found = import_sources(list(order), recipe, None)
        tensors = dict(found.tensors)
        theirs = read_tensors(parts[0])
        embedding = tensors["language.embedding.word_embeddings.weight"]
        assert torch.equal(embedding[:-1], theirs["model.embed_tokens.weight"])
        mean = theirs["model.embed_tokens.weight"].double().mean(0)
        torch.testing.assert_close(embedding[-1].double(), mean, atol=1e-7, rtol=0)
        patches = read_tensors(parts[1])["vision_model.embeddings.patch_embedding.weight"]
        assert torch.equal(tensors["vision.patch_embedding.weight"], patches)
        drawn = weight_drawer(recipe.model, 5)("connector.linear_1.weight", (32, 16))
        assert torch.equal(tensors["connector.linear_1.weight"], drawn)
        assert found.tokenizer.added_tokens == {IMAGE_TOKEN: VOCAB_SIZE - 1}
        assert any("text tower" in reason for reason in found.skipped.values())
    checkpoint = import_checkpoint(list(parts), tmp_path / "checkpoint", recipe)
    assert_bitwise_equal(read_weights(checkpoint), tensors)
    export_checkpoint(checkpoint, tmp_path / "out")


def test_parts_must_make_a_whole(parts, llava_dir, tmp_path):
    recipe = parts_recipe(parts)
    smaller = replace(
        recipe, model=replace(recipe.model, language=replace(recipe.model.language, vocab_size=400))
    )
    for sources, wanted, message in (
        ([], recipe, "name at least one"),
        (parts[:1], recipe, "no vision model among the sources"),
        (parts[1:], recipe, "no language model among the sources"),
        (parts, None, "--recipe: needed"),
        ((llava_dir, parts[1]), recipe, "both hold a vision model"),
        (parts, smaller, "vocab_size is 400 in the recipe and 419 in the sources"),
    ):
        with pytest.raises(InputError, match=message):
            import_checkpoint(list(sources), tmp_path / "out", wanted)
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_may_come_from_elsewhere(parts, tokenizer_dir, tmp_path):
    recipe = parts_recipe(parts)
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in parts[0].glob("*"):
        if path.name != "tokenizer.model":
            (bare / path.name).symlink_to(path)
    sources = [bare, parts[1]]
    with pytest.raises(InputError, match=r"no tokenizer\.model .*; copy"):
        import_sources(sources, recipe, None)
    assert import_sources(sources, recipe, tokenizer_dir).tokenizer.image_id == VOCAB_SIZE - 1
    recipe.tokenizer = str(tokenizer_dir)
    assert import_sources(sources, recipe, None).tokenizer.image_id == VOCAB_SIZE - 1


def test_tokenizer_and_model_must_agree(llava_dir, tmp_path):
    source = tmp_path / "hf"
    shutil.copytree(llava_dir, source)
    edit_config(source, lambda config: config.update(image_token_index=7))
    with pytest.raises(InputError, match="image_token_index is 7, but in the tokenizer <image> is 419"):
        import_llava(source)
