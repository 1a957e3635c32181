"""LlavaProcessor on an exported directory gives exactly what megamm feeds its models: ids and pixels."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from megamm.config import ImageConfig
from megamm.convert import export_llava, import_llava
from megamm.convert.processor import chat_template, image_config_from_hf, image_processor
from megamm.data.images import make_image_loader
from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from tests.convert.helpers import hf_llava, recipe_for, save_hf
from tests.data import huggingface

IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
SIZES = [(28, 28), (61, 40), (40, 61), (97, 33), (31, 200), (14, 10)]


def png(width: int, height: int) -> bytes:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def export(source: Path, tokenizer_dir: Path, out: Path, image: ImageConfig, template: str = "vicuna"):
    from transformers import AutoProcessor

    found = import_llava(source)
    export_llava(found.tensors, recipe_for(found.model, image, template), tokenizer_dir, out)
    return AutoProcessor.from_pretrained(out)


def expanded(ids: list[int], tokenizer: Tokenizer, count: int) -> list[int]:
    """What the assembly of batches makes of one placeholder per image."""
    return [i for token in ids for i in [token] * (count if token == tokenizer.image_id else 1)]


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("values", [{}, IMAGENET], ids=["clip", "imagenet"])
def test_pixels_are_equal(fit, values, llava_dir, tokenizer_dir, tmp_path):
    config = ImageConfig(loader="pillow", fit=fit, **values)
    processor = export(llava_dir, tokenizer_dir, tmp_path / "out", config)
    loader = make_image_loader(config, 28, training=False)
    for width, height in SIZES:
        data = png(width, height)
        wanted = loader.load([data], [0])[0]
        found = processor(text="<image>", images=Image.open(io.BytesIO(data)), return_tensors="pt")
        assert found.pixel_values.shape == (1, 3, 28, 28)
        torch.testing.assert_close(found.pixel_values[0], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("select", ["default", "full"])
def test_ids_are_equal_and_the_model_takes_them(select, tokenizer, tokenizer_dir, tmp_path):
    model = hf_llava(vision_feature_select_strategy=select, image_seq_length=4 + (select == "full"))
    source = save_hf(model, tokenizer, tmp_path / "hf")
    processor = export(source, tokenizer_dir, tmp_path / "out", ImageConfig(loader="pillow"))
    count = import_llava(source).model.tokens_per_image
    conversation = [Turn("user", "<image>\nWhat is shown in this picture?")]
    template = Template.by_name("vicuna")
    images = [Image.open(io.BytesIO(png(50, 40)))]
    found = processor(text=template.prompt_text(conversation), images=images, return_tensors="pt")
    wanted = expanded(template.prompt(conversation, tokenizer), tokenizer, count)
    assert found.input_ids[0].tolist() == wanted
    with torch.no_grad():
        logits = model(input_ids=found.input_ids, pixel_values=found.pixel_values).logits
    assert logits.shape[:2] == found.input_ids.shape and logits.isfinite().all()


def image_first(text: str) -> list[dict[str, str]]:
    return [{"type": "image"}, {"type": "text", "text": text}]


def test_chat_template_is_megamms_template(llava_dir, tokenizer, tokenizer_dir, tmp_path):
    processor = export(llava_dir, tokenizer_dir, tmp_path / "out", ImageConfig())
    template = Template.by_name("vicuna")
    turns = [
        Turn("user", "What is this? <image>"),
        Turn("assistant", "A cat, it's 100 % sure."),
        Turn("user", 'And "this"?'),
    ]
    contents = [image_first("What is this? "), turns[1].text, [{"type": "text", "text": turns[2].text}]]
    for count in (1, 3):
        messages = [{"role": t.role, "content": c} for t, c in zip(turns[:count], contents, strict=False)]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        assert text == template.prompt_text(turns[:count])
        plain = [{"role": turn.role, "content": turn.text} for turn in turns[:count]]
        assert processor.apply_chat_template(plain, add_generation_prompt=True) == text
    answered = [{"role": t.role, "content": c} for t, c in zip(turns[:2], contents, strict=False)]
    text = processor.apply_chat_template(answered)
    ids, _ = template.render(turns[:2], tokenizer)
    assert processor.tokenizer(text).input_ids == ids
    system = [{"role": "system", "content": "Be brief."}, *answered[:1]]
    text = processor.apply_chat_template(system, add_generation_prompt=True)
    assert text == "Be brief. USER: <image>\nWhat is this? ASSISTANT:"


CHATS = ["vicuna", "llama2_chat", "zephyr", "infimm", "xcomposer"]
TALK = [
    Turn("system", "Be 'brief'."),
    Turn("user", "What is\n<image> this? <image>"),
    Turn("assistant", " A cat, it's 100 % sure.\n"),
    Turn("user", ' And "this"? '),
    Turn("assistant", ""),
]


@pytest.mark.parametrize("kind", ["first", "qwen"])
@pytest.mark.parametrize("name", CHATS)
def test_every_chat_template_is_megamms_template(name, kind, tmp_path):
    """Text and ids, with any number of turns, with and without a system message."""
    from transformers import AutoTokenizer

    new = ["<|endofchunk|>", "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"]
    ours = Tokenizer.load(huggingface.write(kind, tmp_path / "hf"), new)
    ours.save(tmp_path / "saved")
    auto = AutoTokenizer.from_pretrained(tmp_path / "saved")
    template = Template.by_name(name)
    jinja = chat_template(template, ours)
    for first in (0, 1):
        for end in range(first + 1, len(TALK) + 1):
            if TALK[end - 1].role == "system":
                continue
            turns, asks = TALK[first:end], TALK[end - 1].role == "user"
            parts = [re.split("(<image>)", turn.text) for turn in turns]
            listed = [
                [{"type": "image"} if p == "<image>" else {"type": "text", "text": p} for p in some]
                for some in parts
            ]
            for contents in (listed, [turn.text for turn in turns]):
                messages = [
                    {"role": turn.role, "content": content}
                    for turn, content in zip(turns, contents, strict=True)
                ]
                text = auto.apply_chat_template(
                    messages, chat_template=jinja, tokenize=False, add_generation_prompt=asks
                )
                ids, _ = template.render(turns, ours)
                begin = [] if ours.bos_id is None else [ours.bos_id]
                assert begin + auto.encode(text, add_special_tokens=False) == ids


def test_templates_without_conversations_give_no_chat_template(tokenizer):
    for name in ("plain", "pair", "interleaved", "text"):
        assert chat_template(Template.by_name(name), tokenizer) is None


def test_two_images_in_one_turn(llava_dir, tokenizer, tokenizer_dir, tmp_path):
    processor = export(llava_dir, tokenizer_dir, tmp_path / "out", ImageConfig(loader="pillow"))
    template = Template.by_name("vicuna")
    turns = [Turn("user", "<image><image> Which is red?")]
    images = [Image.open(io.BytesIO(png(30, 30))) for _ in range(2)]
    found = processor(text=template.prompt_text(turns), images=images, return_tensors="pt")
    assert found.input_ids[0].tolist() == expanded(template.prompt(turns, tokenizer), tokenizer, 4)
    assert found.pixel_values.shape[0] == 2


def test_the_caption_template_is_no_chat_template(llava_dir, tokenizer_dir, tmp_path):
    found = import_llava(llava_dir)
    recipe = recipe_for(found.model, template="plain")
    report = export_llava(found.tensors, recipe, tokenizer_dir, tmp_path / "out")
    assert "chat_template.jinja" not in report.files
    assert any("plain" in note for note in report.notes)


def test_generation_settings(llava_dir, tokenizer, tokenizer_dir, tmp_path):
    from transformers import GenerationConfig

    export(llava_dir, tokenizer_dir, tmp_path / "out", ImageConfig())
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert config.pad_token_id == tokenizer.pad_id


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_image_settings_are_read_back(fit, llava_dir, tmp_path):
    config = ImageConfig(fit=fit, **IMAGENET)
    values = image_processor(import_llava(llava_dir).model.vision, config)
    for name, contents in (
        ("preprocessor_config.json", values),
        ("processor_config.json", {"image_processor": values}),
    ):
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).write_text(json.dumps(contents))
        assert image_config_from_hf(directory, 28) == config


def test_image_settings_of_other_writers(tmp_path):
    assert image_config_from_hf(tmp_path, 336) == ImageConfig()
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 336, "crop_size": 336}))  # before transformers 4.21
    assert image_config_from_hf(tmp_path, 336) == ImageConfig()
    for values, message in (
        ({"size": 224, "crop_size": 224}, "does not end in 336 x 336"),
        ({"size": {"shortest_edge": 336}, "do_center_crop": False}, "does not end in 336 x 336"),
        ({"size": 336, "resample": 2}, "resample is 2"),
        ({"size": 336, "image_mean": [0.5]}, "image_mean is"),
        ({"size": 336, "do_normalize": False}, "do_normalize is False"),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(InputError, match=message):
            image_config_from_hf(tmp_path, 336)
    shutil.rmtree(tmp_path)
