"""LLaVA as its authors publish it (liuhaotian/llava-v1.5-*): a LLaMA or Mistral directory with a projector.

config.json names the encoder instead of describing it (mm_vision_tower), and the files hold its weights only
where it was trained. No token stands for an image: the authors' code cuts the text at `<image>`, so our row
for that token is left out, and added on import. The first stage of training leaves a file of its own,
mm_projector.bin. Names and defaults are those of llava_arch.py and clip_encoder.py (Liu et al. 2023).
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

from megamm.config import (
    UNCOMPARED_KEYS,
    ConnectorConfig,
    ImageConfig,
    LanguageConfig,
    ModelConfig,
    Part,
    VisionConfig,
)
from megamm.convert import processor
from megamm.convert.engine import read_json, write_json
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields
from megamm.convert.rules import Rule, Table
from megamm.convert.tables import clip, llama, llava
from megamm.convert.tables.positions import resized, wanted_size
from megamm.errors import InputError

PARTS: tuple[Part, ...] = ("vision", "connector", "language")
PROJECTOR_FILE = "mm_projector.bin"
_PROJECTOR, _TOWER = "model.mm_projector.", "model.vision_tower.vision_tower.vision_model."
_ALIASES = [("mm_projector.", _PROJECTOR)]
DEFAULTS: dict[str, Any] = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_patch_merge_type": "flat",
}
_DECODERS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
_CLASSES = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
}
_SELECTIONS = {"patch": "patch", "all": "cls_patch"}
# Side of the images of the published encoders; their other sizes are those of LlavaConfig's defaults.
_PUBLISHED = {"clip-vit-large-patch14": 224, "clip-vit-large-patch14-336": 336}
_PUBLISHER = "openai/"


def table(model: ModelConfig, has_tower: bool = True) -> Table:
    """The mapping of a LLaVA model, with the weights of its encoder or without.

    If `<image>` is the last token of the vocabulary, theirs ends before it.

    Raises:
        InputError: the model is no LLaVA model.
    """
    llava.check_family(model)
    language = _without_image_token(model)
    rules = [*llama.rules(language), *_projector_rules(model)]
    rules += clip.rules(model.vision, _TOWER) if has_tower else []
    return Table(rules, [*clip.SKIPS, *llama.skips(language)], _ALIASES)


def projector_table(model: ModelConfig) -> Table:
    """The mapping of mm_projector.bin."""
    return Table(_projector_rules(model), [], _ALIASES)


def _projector_rules(model: ModelConfig) -> list[Rule]:
    return llava.projector_rules(model, _PROJECTOR, ("0", "2"))


def _without_image_token(model: ModelConfig) -> LanguageConfig:
    language, last = model.language, model.language.vocab_size - 1
    return replace(language, vocab_size=last) if model.image_token_id == last else language


# --- reading ------------------------------------------------------------------------------------------


def _recognises(found: Found) -> bool:
    if found.config:
        return llava.is_original(found.config)
    keys = found.tensors.keys()
    return any(key.removeprefix("model.").startswith("mm_projector.") for key in keys)


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    if not found.config:
        return _read_projector(found, wanted)
    fields = _checked(found)
    kind = fields.one_of("model_type", _DECODERS)
    width, features = fields.integer("mm_hidden_size"), _features(fields)
    keys = found.tensors.keys()
    has_tower = any(key.startswith(_TOWER) for key in keys)
    stored = _encoder(found, fields, wanted) if has_tower else VisionConfig(width=width)
    if stored.width != width:
        raise InputError(
            f"{found.where}: mm_hidden_size is {width}, but the encoder has a width of {stored.width};"
            " use the configuration that belongs to these weights"
        )
    vision = replace(wanted_size(stored, wanted) if has_tower else stored, **features)
    model = ModelConfig(
        assembly="merged",
        language=llama.from_hf({**found.config, "model_type": kind}, found.where),
        vision=vision,
        connector=ConnectorConfig(kind="mlp"),
    )
    mapping = table(replace(model, vision=stored), has_tower)
    mapping.rules = resized(mapping.rules, stored, vision)
    parts = PARTS if has_tower else PARTS[1:]
    return Reading(parts, model, mapping, lacks_image_token=True)


def _checked(found: Found) -> Fields:
    """The fields of config.json, after what megamm's models cannot express has been refused."""
    fields = Fields(found.config, DEFAULTS, found.where)
    fields.only("mm_projector_type", "mlp2x_gelu")
    fields.only("mm_use_im_start_end", False)
    fields.only("mm_patch_merge_type", "flat")
    fields.only("mm_resampler_type", None)
    fields.only("image_aspect_ratio", *processor.LLAVA_FITS)
    fields.only("s2", None, False)
    return fields


def _features(fields: Fields) -> dict[str, Any]:
    layer = fields.get("mm_vision_select_layer")
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InputError(
            f"{fields.where}: mm_vision_select_layer is {layer!r}, but megamm takes the features of one"
            " layer; choose another model"
        )
    select = fields.one_of("mm_vision_select_feature", {theirs: our for our, theirs in _SELECTIONS.items()})
    return {"feature_layer": layer, "feature_select": cast(Literal["patch", "all"], select)}


def _encoder(found: Found, fields: Fields, wanted: ModelConfig | None) -> VisionConfig:
    """The encoder whose weights lie in the files: of the recipe, of our export, or the published one."""
    if wanted is not None:
        plain, vision = VisionConfig(), wanted.vision
        stored = vision.weights_image_size or vision.image_size
        # (which features are taken is config.json's to say)
        return replace(vision, image_size=stored, weights_image_size=None, feature_norm=plain.feature_norm)
    name = fields.get("mm_vision_tower")
    last = name.rstrip("/").rpartition("/")[2] if isinstance(name, str) else ""
    own = found.path / processor.TOWER_FOLDER / "config.json"
    if last == processor.TOWER_FOLDER and own.is_file():
        return clip.from_hf(read_json(own), str(own))
    if last in _PUBLISHED:
        return _published(last)
    raise InputError(
        f"{found.where}: mm_vision_tower is {name!r}, which does not say the sizes of the encoder in the"
        " files; give a --recipe that does"
    )


def _published(name: str) -> VisionConfig:
    return clip.from_hf({**llava.VISION_DEFAULTS, "image_size": _PUBLISHED[name]}, name)


def _read_projector(found: Found, wanted: ModelConfig | None) -> Reading:
    """A lone mm_projector.bin, which says nothing about the model around it: that is the recipe's."""
    if wanted is None:
        raise InputError(f"--recipe: needed with {found.where}, which does not say what its model is")
    llava.check_family(wanted)
    return Reading(("connector",), wanted, projector_table(wanted))


# --- writing ------------------------------------------------------------------------------------------


def _tower_name(vision: VisionConfig, image: ImageConfig) -> str:
    """What mm_vision_tower says: the published encoder if sizes and pixel values are its own, else the folder
    in which the export describes the encoder."""
    plain = ImageConfig()
    if (image.mean, image.std) == (plain.mean, plain.std):
        for name in _PUBLISHED:
            if _geometry(vision) == _geometry(_published(name)):
                return _PUBLISHER + name
    return processor.TOWER_FOLDER


def _geometry(vision: VisionConfig) -> dict[str, Any]:
    """What makes it another encoder; not which of its features are taken."""
    features = {key.partition(".")[2] for key in clip.FEATURES}
    return {k: value for k, value in asdict(vision).items() if k not in UNCOMPARED_KEYS | features}


def _config(target: Target) -> dict[str, Any]:
    """Their config.json.

    The files hold the encoder whether or not it was trained, so that nothing is lost. The authors' code takes
    it from there if unfreeze_mm_vision_tower is true, but makes it from mm_vision_tower first.
    """
    model = replace(target.model, image_token_id=target.image_id)
    llava.check_family(model)
    vision, image = model.vision, target.recipe.data.image
    language = llama.to_hf(_without_image_token(model), target.token_ids)
    model_type, architecture = _CLASSES[language["model_type"]]
    name, dtype = _tower_name(vision, image), str(target.dtype).removeprefix("torch.")
    if image.fit == "squash":
        target.notes.append(
            "LLaVA's code pads or crops images; those of this model were squashed to a square"
        )
    if name == processor.TOWER_FOLDER:
        target.notes.append(
            "LLaVA's code does not know this encoder by name: put the weights that --family clip writes into"
            f" {name}/, and the full path of that folder into mm_vision_tower"
        )
    return {
        **language,
        "model_type": model_type,
        "architectures": [architecture],
        "dtype": dtype,
        "torch_dtype": dtype,
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": name,
        "mm_hidden_size": vision.width,
        "mm_vision_select_layer": vision.feature_layer,
        "mm_vision_select_feature": _SELECTIONS[vision.feature_select],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if image.fit == "pad" else "square",
        "unfreeze_mm_vision_tower": True,
    }


def _extras(target: Target) -> None:
    """Describe the encoder, and what its images are like, unless its name does."""
    vision, image = target.model.vision, target.recipe.data.image
    if _tower_name(vision, image) != processor.TOWER_FOLDER:
        return
    folder: Path = target.directory / processor.TOWER_FOLDER
    folder.mkdir()
    write_json(folder / "config.json", clip.to_hf(vision))
    cropped = replace(image, fit="crop")  # padding comes before, and is LLaVA's own
    write_json(folder / processor.PREPROCESSOR_FILE, processor.image_processor(vision, cropped))


FAMILY = Family(
    "llava_original",
    _recognises,
    _read,
    Export(
        PARTS,
        table,
        _config,
        _extras,
        pickle=(PROJECTOR_FILE, projector_table),
        has_image_token=False,
    ),
)
