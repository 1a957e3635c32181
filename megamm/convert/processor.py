"""The small files beside the weights with which transformers' LlavaProcessor prepares text and images
as megamm does: image processor, placeholders, chat template; and the image settings read back from them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamm.config import ImageConfig, VisionConfig
from megamm.convert.engine import read_json, write_json
from megamm.convert.family import Target
from megamm.convert.fields import Fields
from megamm.data.templates import BEGIN, END, Template
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError

PREPROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
TOWER_FOLDER = "vision_tower"  # in which `llava_original` describes an encoder that has no known name
# image_aspect_ratio of LLaVA's own config.json -> data.image.fit
LLAVA_FITS = {None: "crop", "square": "crop", "pad": "pad"}
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

# Over `messages`; what stands between guillemets is filled in from a Template, and the tokenizer adds `<s>`.
# The places of images are those of training: all at the front of their turn, or where they are in its words.
_CHAT = """\
{%- macro words(message) -%}
{%- set content = message['content'] -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for item in content -%}{{- "<image>" if item['type'] == 'image' else item['text'] -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro question(message) -%}
{%- set text = words(message) -%}
{%- set pieces = text.split("<image>") -%}
«IMAGES»
{%- endmacro -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = «BEFORE_MESSAGE» + words(messages[0]) + «AFTER_MESSAGE» -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = «SYSTEM» -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- («BEFORE_SYSTEM» + system if loop.first else «AGAIN») + «BEFORE_QUESTION» + question(message) -}}
{%- else -%}
{{- «AFTER_QUESTION» + «BEFORE_ANSWER» + words(message) + «AFTER_ANSWER» -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- «AFTER_QUESTION» -}}{%- endif -%}"""
_FRONT = """\
{{- text if pieces|length == 1 else «IMAGE» * (pieces|length - 1) + pieces|join('')|trim -}}"""
_WORDS = """\
{%- for piece in pieces -%}
{%- if not loop.first -%}{{- «IMAGE» -}}{%- endif -%}
{{- piece if pieces|length == 1 else piece.rstrip() if loop.first else piece.lstrip() if loop.last
 else piece|trim -}}
{%- endfor -%}"""


def chat_template(template: Template, tokenizer: Tokenizer) -> str | None:
    """A prompt template in Jinja, or None if it is no template for conversations.

    It renders words as they are: what a user writes like a control token is one for transformers.
    """
    if template.takes != "conversation":
        return None
    opening, before_question, after_question = _pieces(template.question, "system", "question")
    before_message, after_message = _pieces(template.system, "system")
    before_answer, after_answer = _pieces(template.answer, "answer")
    default = template.default_system
    fill = {
        "IMAGES": _FRONT if template.place == "front" else _WORDS,
        "IMAGE": template.image,
        "BEFORE_MESSAGE": before_message,
        "AFTER_MESSAGE": after_message,
        "SYSTEM": "" if default is None else before_message + default + after_message,
        "BEFORE_SYSTEM": opening,
        "AGAIN": template.again + opening,
        "BEFORE_QUESTION": before_question,
        "AFTER_QUESTION": after_question,
        "BEFORE_ANSWER": before_answer,
        "AFTER_ANSWER": after_answer + template.after,
    }
    begin = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
    text = _CHAT
    for name, value in fill.items():
        value = value.replace(END, tokenizer.token_text(tokenizer.eos_id)).replace(BEGIN, begin)
        text = text.replace(f"«{name}»", value if name == "IMAGES" else json.dumps(value))
    return text


def _pieces(pattern: str, *names: str) -> list[str]:
    """What stands before, between and behind the fields of a pattern."""
    found = []
    for name in names:
        before, _, pattern = pattern.partition("{" + name + "}")
        found.append(before)
    return [*found, pattern]


def image_processor(vision: VisionConfig, image: ImageConfig) -> dict[str, Any]:
    """preprocessor_config.json: what megamm does to a picture at evaluation (nothing random).

    "crop" and "squash" are CLIPImageProcessor's; "pad" is LlavaImageProcessor's, which pads with the
    mean colour rounded down to whole levels.
    """
    square = {"height": vision.image_size, "width": vision.image_size}
    crop = image.fit == "crop"
    found: dict[str, Any] = {
        "image_processor_type": "LlavaImageProcessor" if image.fit == "pad" else "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": vision.image_size} if crop else square,
        "resample": _BICUBIC,
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    if image.fit == "pad":
        found["do_pad"] = True
    return found


def processor(vision: VisionConfig) -> dict[str, Any]:
    """processor_config.json: how many placeholders an image takes.

    transformers counts the patches, adds the class token, and takes it off again for "default".
    """
    return {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default" if vision.feature_select == "patch" else "full",
    }


def write_processor(target: Target) -> None:
    """Write image processor, placeholders, chat template and generation settings, if there is a tokenizer."""
    if target.tokenizer is None:
        return
    vision, directory = target.model.vision, target.directory
    write_json(directory / PREPROCESSOR_FILE, image_processor(vision, target.recipe.data.image))
    write_json(directory / PROCESSOR_FILE, processor(vision))
    write_json(directory / "generation_config.json", target.token_ids)
    chat = chat_template(Template.by_name(target.recipe.template), target.tokenizer)
    if chat is None:
        target.notes.append(
            f"template {target.recipe.template} is no template for conversations; none was exported"
        )
    else:
        (directory / "chat_template.jinja").write_text(chat, encoding="utf-8")


def image_config_of(sources: list[Path], image_size: int) -> ImageConfig:
    """The image settings of a model from one directory or several: of the first that has an image processor;
    whether images are padded is what LLaVA's own configuration says, if there is one.

    Raises:
        InputError: as `image_config_from_hf`.
    """
    places = [place for source in sources for place in (source, source / TOWER_FOLDER)]
    files = (PREPROCESSOR_FILE, PROCESSOR_FILE)
    described = (place for place in places if any((place / name).exists() for name in files))
    image = image_config_from_hf(next(described, sources[0]), image_size)
    for path in (source / "config.json" for source in sources):
        if path.is_file() and read_json(path).get("image_aspect_ratio") == "pad":
            image.fit = "pad"
    return image


def image_config_from_hf(directory: Path, image_size: int) -> ImageConfig:
    """The image settings of a Hugging Face directory; CLIP's where it has no image processor file.

    Raises:
        InputError: the file is damaged, or prepares images in a way that megamm has no word for.
    """
    path = directory / PREPROCESSOR_FILE
    values: Any = None
    if path.exists():
        values = read_json(path)
    elif (directory / PROCESSOR_FILE).exists():
        path = directory / PROCESSOR_FILE
        values = read_json(path).get("image_processor")
    if values is None:
        return ImageConfig()
    defaults = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": _BICUBIC}
    fields = Fields(values, {**defaults, "do_center_crop": True}, str(path))
    for key, allowed in (
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("resample", _BICUBIC),
    ):
        fields.only(key, allowed)
    image = ImageConfig()
    image.mean = fields.triple("image_mean", image.mean)
    image.std = fields.triple("image_std", image.std)
    size, cropped = _edges(fields.get("size")), _edges(fields.get("crop_size"))
    square = (image_size, image_size)
    if fields.get("do_pad") and size in (square, (image_size,)):
        image.fit = "pad"
    elif fields.get("do_center_crop") and size == (image_size,) and cropped in (None, square, (image_size,)):
        image.fit = "crop"
    elif not fields.get("do_center_crop") and size == square:
        image.fit = "squash"
    else:
        raise InputError(
            f"{path}: its resizing and cropping does not end in {image_size} x {image_size} by crop, squash"
            " or pad; give a recipe that says how images are prepared"
        )
    return image


def _edges(size: Any) -> tuple[Any, ...] | None:
    """(shortest edge,) or (height, width) of a size as any release of transformers writes it."""
    if isinstance(size, dict):
        if "shortest_edge" in size:
            return (size["shortest_edge"],)
        return (size.get("height"), size.get("width"))
    return None if size is None else (size,)
