"""What lies in a Hugging Face model directory: which part of a model, its configuration, its tensors.

Only JSON and safetensors are read; nothing in the directory is ever executed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megamm.config import LanguageConfig, ModelConfig, VisionConfig
from megamm.convert.engine import OurTensors, SafetensorsDirectory, read_json
from megamm.convert.rules import Skip, Table
from megamm.convert.tables import clip, llama, llava
from megamm.errors import InputError
from megamm.models.initialization import weight_drawer


@dataclass(frozen=True)
class Source:
    """A directory that was recognised; nothing but configuration and headers has been read.

    Attributes:
        parts: which of "vision", "connector", "language" it holds.
        model: its configuration; only the sections of `parts` mean anything.
        tensors: under our names, computed when asked for.
        image_id: id of the image placeholder, if config.json names one.
    """

    directory: Path
    parts: tuple[str, ...]
    model: ModelConfig
    tensors: OurTensors
    image_id: int | None = None


def open_source(directory: Path) -> Source:
    """Recognise a Hugging Face model directory by the model_type in its config.json.

    Raises:
        InputError: the directory is not complete, damaged, or of no kind that megamm knows.
    """
    where = str(directory / "config.json")
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; name a Hugging Face model directory")
    config = read_json(directory / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(
            f"{where}: model_type is {kind!r}; choose one that megamm imports: {', '.join(_KINDS)}"
        )
    return _KINDS[kind](directory, config, where)


def _open_llava(directory: Path, config: dict[str, Any], where: str) -> Source:
    model = llava.from_hf(config, where)
    tensors = OurTensors(llava.table(model), SafetensorsDirectory(directory))
    image_id = llava.image_token_id(config, where)
    return Source(directory, ("vision", "connector", "language"), model, tensors, image_id)


def _open_language(directory: Path, config: dict[str, Any], where: str) -> Source:
    language = llama.from_hf(config, where)
    skips = list(llama.SKIPS)
    if language.tie_embeddings:
        skips.append(Skip(r"lm_head\.weight", "the output layer shares the weights of the embedding"))
    table = Table(llama.rules(language), skips)
    tensors = OurTensors(table, SafetensorsDirectory(directory))
    return Source(directory, ("language",), ModelConfig(language=language), tensors)


def _open_vision(directory: Path, config: dict[str, Any], where: str) -> Source:
    values: Any = config
    if config["model_type"] == "clip":
        where = f"{where}, vision_config"
        section = config.get("vision_config")
        values = {"model_type": "clip_vision_model", **section} if isinstance(section, dict) else section
    vision = clip.from_hf(values, where)
    table = Table(clip.rules(vision), [*clip.SKIPS, *clip.TEXT_TOWER], [("vision_model.", "")])
    tensors = OurTensors(table, SafetensorsDirectory(directory))
    return Source(directory, ("vision",), ModelConfig(vision=vision), tensors)


_KINDS: dict[str, Callable[[Path, dict[str, Any], str], Source]] = {
    "llava": _open_llava,
    "llama": _open_language,
    "mistral": _open_language,
    "clip": _open_vision,
    "clip_vision_model": _open_vision,
}


class Assembled(Mapping[str, Tensor]):
    """The tensors of a whole model from separately released parts.

    Token embeddings (and output rows) that the language model did not have yet start as the mean of those
    it has, so that new tokens are neither favoured nor ruled out. A missing connector starts from random
    numbers.
    """

    def __init__(self, sources: list[Source], model: ModelConfig, seed: int) -> None:
        self._from = {key: source.tensors for source in sources for key in source.tensors}
        self._vocab_size = model.language.vocab_size
        self._new: dict[str, Tensor] = {}
        if not any("connector" in source.parts for source in sources):
            dtype = self._from["language.decoder.final_layernorm.weight"][
                "language.decoder.final_layernorm.weight"
            ].dtype
            self._new = new_connector(model, seed, dtype)

    def __getitem__(self, key: str) -> Tensor:
        if key in self._new:
            return self._new[key]
        tensor = self._from[key][key]
        if key in _VOCABULARY and len(tensor) < self._vocab_size:
            mean = tensor.double().mean(dim=0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(self._vocab_size - len(tensor), -1)])
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._from
        yield from self._new

    def __len__(self) -> int:
        return len(self._from) + len(self._new)


_VOCABULARY = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")


def new_connector(model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A projector to start training from, drawn as for a model that starts from random weights."""
    draw = weight_drawer(model, seed)
    return {rule.ours: draw(rule.ours, rule.our_shape()).to(dtype) for rule in llava.projector_rules(model)}


def combined(sources: list[Source]) -> ModelConfig:
    """The configuration of all sources together; parts that none has keep their defaults.

    Raises:
        InputError: two sources hold the same part.
    """
    holders: dict[str, Path] = {}
    for source in sources:
        for part in source.parts:
            if part in holders:
                raise InputError(
                    f"--from: {holders[part]} and {source.directory} both hold a {part} model; give one"
                )
            holders[part] = source.directory
    vision, language = VisionConfig(), LanguageConfig()
    for source in sources:
        vision = source.model.vision if "vision" in source.parts else vision
        language = source.model.language if "language" in source.parts else language
    return ModelConfig(language=language, vision=vision)
