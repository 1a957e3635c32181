"""OpenFlamingo (Awadalla et al. 2023): its checkpoint.pt, which holds only what is trained, and a directory
with the whole model.

checkpoint.pt has the resampler, the gated blocks and the token embeddings; encoder and language model come
from where they were published. The directory has all of it, under the names of open_flamingo's own module.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megamm.config import ModelConfig, Part
from megamm.convert.family import Export, Family, Found, Reading, Target
from megamm.convert.fields import Fields, image_token_id
from megamm.convert.remote_code import auto_map, write_image_processor, write_remote_code
from megamm.convert.rules import PadRows, Rule, Table
from megamm.convert.tables import clip, flamingo, llama, openclip
from megamm.errors import InputError

ARCHITECTURE = "OpenFlamingoForConditionalGeneration"
MODEL_TYPE = "open_flamingo"
PARTS: tuple[Part, ...] = ("vision", "connector", "language", "cross_attention")
# The features taken: patches behind the last block and its norm.
_FEATURES = {"feature_layer": -1, "feature_select": "patch", "feature_norm": True}
_LAYERS = "lang_encoder.model.layers."
_EMBEDDING, _OUTPUT = "lang_encoder.model.embed_tokens.weight", "lang_encoder.lm_head.weight"
_ALIASES = [("module.", "")]  # saved from within DistributedDataParallel


def table(model: ModelConfig, padded_vocab: int | None = None) -> Table:
    """The complete mapping of an OpenFlamingo model.

    Raises:
        InputError: the model is no OpenFlamingo model.
    """
    check_family(model)
    rules = [
        *openclip.rules(model.vision, "vision_encoder."),
        *flamingo.resampler_rules(model, "perceiver."),
        *flamingo.decoder_rules(model, "lang_encoder.", padded_vocab),
        *flamingo.gated_block_rules(model, _LAYERS),
    ]
    return Table(rules, flamingo.skips(model, r"lang_encoder\."), _ALIASES)


def check_family(model: ModelConfig) -> None:
    """Raises InputError unless OpenFlamingo's module can express the model."""
    flamingo.check(model, "OpenFlamingo", _FEATURES, skip_text_only=False)
    clip.check(model.vision)


def checkpoint_table(model: ModelConfig, has_output: bool = False) -> Table:
    """The mapping of a checkpoint.pt: resampler, gated blocks and embeddings of a model."""
    vocab = (model.language.vocab_size, model.language.hidden_size)
    rules: list[Rule] = [
        *flamingo.resampler_rules(model, "perceiver."),
        PadRows(llama.EMBEDDING, _EMBEDDING, vocab),
        *flamingo.gated_block_rules(model, _LAYERS),
    ]
    if has_output:
        rules.append(PadRows(llama.OUTPUT, _OUTPUT, vocab))
    return Table(rules, [], _ALIASES)


# --- the directory ------------------------------------------------------------------------------------


def to_hf(
    model: ModelConfig, token_ids: dict[str, int | None], image_id: int | None, dtype: torch.dtype
) -> dict[str, Any]:
    """The config.json of a model."""
    check_family(model)
    name = str(dtype).removeprefix("torch.")
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": auto_map("open_flamingo", "OpenFlamingoConfig", ARCHITECTURE),
        "dtype": name,
        "torch_dtype": name,
        "visual": clip.to_hf(model.vision),
        "language": llama.to_hf(model.language, token_ids),
        **flamingo.geometry_to_hf(model),
        "image_token_id": image_id,
        "tie_word_embeddings": model.language.tie_embeddings,
        **token_ids,
    }


def from_hf(config: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json written by `to_hf` describes.

    Raises:
        InputError: a value is missing, malformed, or nothing that megamm's models can express.
    """
    fields = Fields(config, {}, where)
    connector, blocks = flamingo.geometry_from_hf(fields, skip_text_only=False)
    vision = clip.from_hf(fields.get("visual"), f"{where}, visual")
    vision.feature_layer, vision.feature_select, vision.feature_norm = -1, "patch", True
    model = ModelConfig(
        assembly="cross_attention",
        language=llama.from_hf(fields.get("language"), f"{where}, language"),
        vision=vision,
        connector=connector,
        cross_attention=blocks,
    )
    check_family(model)
    return model


# --- checkpoint.pt ------------------------------------------------------------------------------------


def _read_checkpoint(found: Found, wanted: ModelConfig | None) -> Reading:
    """A checkpoint.pt does not say how wide its heads are, nor which features it takes: the recipe does."""
    names = found.tensors.keys()
    keys = {key.removeprefix("module."): key for key in names}
    if _EMBEDDING not in keys:
        raise InputError(
            f"{found.where}: has no {_EMBEDDING}; megamm imports OpenFlamingo models whose language model is"
            " LLaMA or Mistral"
        )
    if wanted is None:
        raise InputError(f"--recipe: needed with {found.where}, which does not say what its model is")
    check_family(wanted)
    # the recipe may want more tokens than the checkpoint has, not fewer
    rows = found.tensors.shape(keys[_EMBEDDING])[0]
    if rows > wanted.language.vocab_size:
        raise InputError(
            f"--recipe: model.language.vocab_size is {wanted.language.vocab_size}, but {found.where} has"
            f" {rows} tokens; correct the recipe"
        )
    model = replace(wanted, language=replace(wanted.language, vocab_size=rows))
    return Reading(("connector", "cross_attention"), model, checkpoint_table(model, _OUTPUT in keys))


# --- the family ---------------------------------------------------------------------------------------


def _recognises(found: Found) -> bool:
    if found.config:
        return found.config.get("model_type") == MODEL_TYPE
    return bool({"perceiver.latents", "module.perceiver.latents"} & set(found.tensors.keys()))


def _read(found: Found, wanted: ModelConfig | None) -> Reading:
    if not found.config:
        return _read_checkpoint(found, wanted)
    model = from_hf(found.config, found.where)
    return Reading(PARTS, model, table(model), image_token_id(found.config, found.where))


def _config(target: Target) -> dict[str, Any]:
    return to_hf(target.model, target.token_ids, target.need_image_id(), target.dtype)


_WHAT = "OpenFlamingo: a CLIP encoder, a perceiver resampler, and gated cross-attention blocks in a decoder."
_USAGE = """# pixel_values: [images, 3, height, width], in the order of the <image> tokens in input_ids
logits = model(input_ids=input_ids, pixel_values=pixel_values).logits
ids = model.generate(input_ids=input_ids, pixel_values=pixel_values, max_new_tokens=64)"""

_NOTE = """`checkpoint.pt` holds what open_flamingo's own checkpoints hold: resampler, gated blocks and token
embeddings. The safetensors have everything, under the names of its module."""


def _extras(target: Target) -> None:
    write_remote_code(target, "open_flamingo", _WHAT, _USAGE, _NOTE)
    write_image_processor(target)


FAMILY = Family(
    "open_flamingo",
    _recognises,
    _read,
    Export(PARTS, table, _config, _extras, pickle=("checkpoint.pt", checkpoint_table)),
)
