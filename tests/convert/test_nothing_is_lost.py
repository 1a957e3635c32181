"""Every key of a model: an export either refuses it or says it so that reading gives it back."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_args, get_type_hints

import pytest
import torch

from megamm.config import (
    UNCOMPARED_KEYS,
    ConnectorConfig,
    CrossAttentionConfig,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
)
from megamm.convert.engine import read_json, write_json
from megamm.convert.families import FAMILIES, recognise
from megamm.convert.family import Export, Found
from megamm.convert.rules import Table
from megamm.errors import InputError
from megamm.recipe import validate
from tests.convert.families import IMAGE_ID, target
from tests.convert.helpers import recipe_for
from tests.convert.test_flamingo import VARIANTS as FLAMINGOS
from tests.convert.test_flamingo import VISIONS
from tests.convert.test_xcomposer import VARIANTS as XCOMPOSERS

LANGUAGE = LanguageConfig(
    num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=40, vocab_size=67
)
HEADS = replace(LANGUAGE, num_kv_heads=4)
BIASES: dict[str, Any] = dict(qkv_bias=True, out_bias=True)
CLIP = VisionConfig(image_size=28, patch_size=14, width=24, num_layers=2, num_heads=2, mlp_width=40)
IDEFICS = ModelConfig(
    assembly="cross_attention",
    language=replace(HEADS, added_vocab=3),
    vision=replace(CLIP, feature_layer=-1, feature_select="all"),
    connector=ConnectorConfig(kind="resampler", activation="relu", num_heads=2, head_dim=10),
    cross_attention=CrossAttentionConfig(geometry="idefics", every=2),
)


def decoder(language: LanguageConfig) -> ModelConfig:
    return ModelConfig(assembly="language", language=language)


def encoder(vision: VisionConfig) -> ModelConfig:
    return ModelConfig(assembly="vision", vision=vision)


# families with models of theirs
MODELS: dict[str, list[ModelConfig]] = {
    "llava": [
        ModelConfig(language=LANGUAGE, vision=CLIP),
        ModelConfig(language=replace(HEADS, **BIASES), vision=replace(CLIP, feature_select="all")),
    ],
    "idefics": [IDEFICS, replace(IDEFICS, language=replace(HEADS, num_kv_heads=None, tie_embeddings=True))],
    "infimm": [model for family, model in FLAMINGOS.values() if family.name == "infimm"],
    "open_flamingo": [model for family, model in FLAMINGOS.values() if family.name == "open_flamingo"],
    "xcomposer": list(XCOMPOSERS.values()),
    "llava_original": [ModelConfig(language=LANGUAGE, vision=CLIP)],
    "llama": [
        decoder(LANGUAGE),
        decoder(replace(LANGUAGE, **BIASES)),
        decoder(replace(HEADS, sliding_window=7)),
    ],
    "internlm": [decoder(HEADS), decoder(replace(HEADS, num_kv_heads=None, **BIASES))],
    "clip": [encoder(CLIP)],
    "openclip": [encoder(CLIP)],
    "eva": [encoder(VISIONS[name]) for name in ("eva g", "eva L", "eva E")],
}
WITHOUT_CONFIG = {"peft"}  # describes adapters alone: tests/convert/test_peft.py
# Other values of each key; a key of a closed set has all of them, one more that is a number comes by itself.
OTHERS: dict[str, tuple[Any, ...]] = {
    "language.hidden_size": (64,),
    "language.num_layers": (6, 8),
    "language.num_heads": (2, 8),
    "language.num_kv_heads": (1, 2, 4),
    "language.sliding_window": (None, 5),
    "vision.image_size": (56, 84, 336),
    "vision.patch_size": (7,),
    "vision.width": (48,),
    "vision.num_heads": (1, 3),
    "vision.activation": ("quick_gelu", "gelu", "swiglu"),
    "vision.qkv_bias": ("all", "qv"),
    "vision.residual": ("pre_norm", "post_norm"),
    "vision.rotary_side": (None, 4),
    "vision.feature_layer": (-2, -1, 0, 1),
    "vision.feature_select": ("patch", "all"),
    "connector.kind": ("mlp", "resampler", "qformer"),
    "connector.activation": ("gelu", "relu"),
    "cross_attention.geometry": ("flamingo", "idefics"),
    "cross_attention.every": (1, 2, 4),
    "lora.targets": (["q"], ["v", "up", "down"], ["gate"], ["q", "k", "v", "o", "up", "down"]),
}
OF_NO_MLP = {f"connector.{field.name}" for field in fields(ConnectorConfig)} - {"connector.kind"}
OF_NO_ADAPTERS = {"lora.alpha", "lora.targets"}
# what every format can say
SIZES = {
    *("language.hidden_size", "language.num_layers", "language.num_heads", "language.ffn_hidden_size"),
    *("language.vocab_size", "language.max_positions", "language.norm_eps", "language.rope_theta"),
    *("language.tie_embeddings", "vision.image_size", "vision.patch_size", "vision.width"),
    *("vision.num_layers", "vision.num_heads", "vision.mlp_width"),
    *("connector.num_latents", "connector.depth", "connector.num_heads", "connector.head_dim"),
    *("cross_attention.every", "lora.rank", "lora.alpha", "lora.targets"),
}


class Headers:
    """Tensors of which only names and shapes are known."""

    def __init__(self, table: Table) -> None:
        self._shapes = {
            key: shape
            for rule in table.rules
            for key, shape in zip(rule.theirs, rule.their_shapes(), strict=True)
        }

    def keys(self) -> list[str]:
        return list(self._shapes)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shapes[key]

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32

    def tensor(self, key: str) -> torch.Tensor:
        raise AssertionError("a configuration is read without the weights")


def is_whole(name: str) -> bool:
    """Whether the family holds models of several parts."""
    return "connector" in export_of(name).parts


def export_of(name: str) -> Export:
    export = next(family.export for family in FAMILIES if family.name == name)
    assert export is not None
    return export


def meaningless(model: ModelConfig) -> set[str]:
    """Keys that nothing of a model depends on, though a recipe may set them."""
    return (OF_NO_MLP if model.connector.kind == "mlp" else set()) | (
        OF_NO_ADAPTERS if not model.lora.rank else set()
    )


def others(name: str, model: ModelConfig) -> list[tuple[str, ModelConfig]]:
    """Models that differ in one key of the parts that the family has."""
    found = []
    for assembly in get_args(get_type_hints(ModelConfig)["assembly"]) if is_whole(name) else ():
        if assembly != model.assembly:
            found.append(("assembly", replace(deepcopy(model), assembly=assembly)))
    for part in export_of(name).parts:
        section = getattr(model, part)
        for field in fields(section):
            key, value = f"{part}.{field.name}", getattr(section, field.name)
            if field.name in UNCOMPARED_KEYS or key in meaningless(model):
                continue
            for other in OTHERS.get(key) or ((not value,) if isinstance(value, bool) else (3 * value,)):
                if other != value:
                    changed = deepcopy(model)
                    setattr(getattr(changed, part), field.name, other)
                    found.append((key, changed))
    return found


def told(name: str, model: ModelConfig, out: Path) -> ModelConfig:
    """Exported below `out`, and read again.

    Raises:
        InputError: the family cannot express it.
    """
    export, model = export_of(name), replace(model, image_token_id=IMAGE_ID)
    table = export.table(model)
    out = Path(mkdtemp(dir=out))
    goal = target(out, model, IMAGE_ID)
    if export.config is not None:
        write_json(out / "config.json", export.config(goal))
    export.extras(goal)
    config = out / "config.json"
    source = Found(out, read_json(config) if config.exists() else {}, Headers(table))
    family = recognise(source)
    assert family.name == name
    reading = family.read(source, None)
    assert sorted(reading.table.their_keys()) == sorted(table.their_keys())
    for key in reading.leaves_open:
        part, _, field = key.partition(".")
        setattr(getattr(reading.model, part), field, getattr(getattr(model, part), field))
    return reading.model


def meant(name: str, model: ModelConfig) -> dict[str, Any]:
    """What the configuration says about the parts of a family, said in one way."""
    model = deepcopy(model)
    language, vision = model.language, model.vision
    language.num_kv_heads = language.num_kv_heads or language.num_heads
    if vision.num_layers:
        vision.feature_layer %= vision.num_layers + 1
    model.lora.targets.sort()
    said = {
        f"{part}.{key}": value
        for part in export_of(name).parts
        for key, value in asdict(getattr(model, part)).items()
        if key not in UNCOMPARED_KEYS and f"{part}.{key}" not in meaningless(model)
    }
    return {**said, "assembly": model.assembly} if is_whole(name) else said


def test_every_family_is_here() -> None:
    written = {family.name for family in FAMILIES if family.export is not None}
    assert set(MODELS) | WITHOUT_CONFIG == written


@pytest.mark.parametrize("name", MODELS)
def test_what_is_not_refused_comes_back(name: str, tmp_path: Path) -> None:
    came_back, lost = set(), []
    for base in MODELS[name]:
        assert meant(name, told(name, base, tmp_path)) == meant(name, base)
        for key, model in others(name, base):
            try:
                validate(recipe_for(model))
                found = told(name, model, tmp_path)
            except InputError:
                continue
            came_back.add(key)
            wanted, got = meant(name, model), meant(name, found)
            lost += [f"{key} {wanted[key]!r}: {k} became {got[k]!r}" for k in wanted if got[k] != wanted[k]]
    assert not lost, "\n".join(lost)
    parts = export_of(name).parts
    said_by_all = {key for key in SIZES - meaningless(MODELS[name][0]) if key.split(".")[0] in parts}
    assert said_by_all <= came_back
