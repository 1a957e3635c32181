"""What `--from` names: parts of a model, their configuration, their tensors; and a whole made of several.

Only JSON and weights are read; nothing in a source is ever executed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megamm.config import ModelConfig, VisionConfig
from megamm.convert.engine import OurTensors, read_json
from megamm.convert.families import recognise
from megamm.convert.family import Family, Found, Reading
from megamm.convert.files import SourceFiles
from megamm.convert.tables import clip, llama, llava
from megamm.engine.weight_files import StreamedTensor, whole_tensors
from megamm.errors import InputError
from megamm.models.freezing import part_of
from megamm.models.initialization import mean_row, weight_drawer

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class Source:
    """A source that was recognised; nothing but configuration and headers has been read.

    Attributes:
        path: a directory, or a file of weights.
        family: its name.
        reading: which parts it holds, their configuration and keys.
        tensors: under our names, computed when asked for.
    """

    path: Path
    family: str
    reading: Reading
    tensors: OurTensors

    @property
    def parts(self) -> tuple[str, ...]:
        return self.reading.parts

    @property
    def model(self) -> ModelConfig:
        return self.reading.model

    @property
    def image_id(self) -> int | None:
        return self.reading.image_id


def open_sources(paths: list[Path], wanted: ModelConfig | None = None) -> list[Source]:
    """Recognise model directories, or files of weights; adapters come last.

    Args:
        wanted: the recipe's model, for what the sources themselves do not say.
    Raises:
        InputError: one is not complete, damaged, or of no family that megamm knows.
    """
    known = [_recognised(path) for path in paths]
    opened = [_open(found, family, wanted) for found, family in known if not family.adapts]
    base = wanted or combined(opened)
    return opened + [_open(found, family, base) for found, family in known if family.adapts]


def _recognised(path: Path) -> tuple[Found, Family]:
    if not path.exists():
        raise InputError(f"{path}: no such directory; name a Hugging Face model directory")
    where = path / CONFIG_FILE
    found = Found(path, read_json(where) if where.is_file() else {}, SourceFiles(path))
    return found, recognise(found)


def _open(found: Found, family: Family, wanted: ModelConfig | None) -> Source:
    reading = family.read(found, wanted)
    return Source(found.path, family.name, reading, OurTensors(reading.table, found.tensors, str(found.path)))


class Assembled(Mapping[str, Tensor]):
    """The tensors of a model from one source or several.

    Token embeddings (and output rows) that the language model did not have yet start as the mean of those
    it has, so that new tokens are neither favoured nor ruled out. A tensor that two sources have is taken
    from the one that does not hold the rest of its part: it was trained along with something else.

    Args:
        new: tensors that no source has.
    """

    def __init__(self, sources: list[Source], model: ModelConfig, new: dict[str, Tensor]) -> None:
        self._from: dict[str, OurTensors] = {}
        for is_own_part in (True, False):
            for source in sources:
                keys = [key for key in source.tensors if (part_of(key) in source.parts) == is_own_part]
                self._from |= dict.fromkeys(keys, source.tensors)
        self._vocab_size = model.language.vocab_size
        self._new = new

    def __getitem__(self, key: str) -> Tensor:
        if key in self._new:
            return self._new[key]
        tensor = self._from[key][key]
        return torch.cat([tensor, *rows]) if (rows := self._missing_rows(key, tensor)) else tensor

    def __iter__(self) -> Iterator[str]:
        yield from self._from
        yield from self._new

    def __len__(self) -> int:
        return len(self._from) + len(self._new)

    def dtype(self, key: str) -> torch.dtype:
        return self._new[key].dtype if key in self._new else self._from[key].dtype(key)

    def streamed(self) -> Iterator[StreamedTensor]:
        """All of them, for writing: made one at a time."""
        for key, source in self._from.items():
            tensor = source.streamed(key)
            if key in _VOCABULARY and tensor.shape[0] < self._vocab_size:
                shape = (self._vocab_size, *tensor.shape[1:])
                tensor = replace(tensor, shape=shape, pieces=partial(self._with_missing_rows, key))
            yield tensor
        yield from whole_tensors(self._new)

    def _with_missing_rows(self, key: str) -> list[Tensor]:
        tensor = self._from[key][key]
        return [tensor, *self._missing_rows(key, tensor)]

    def _missing_rows(self, key: str, tensor: Tensor) -> list[Tensor]:
        missing = self._vocab_size - len(tensor) if key in _VOCABULARY else 0
        if missing <= 0:
            return []
        return [mean_row(tensor).expand(missing, -1)]


_VOCABULARY = (llama.EMBEDDING, llama.OUTPUT)


def new_connector(model: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A projector to start training from, drawn as for a model that starts from random weights."""
    draw = weight_drawer(model, seed)
    return {rule.ours: draw(rule.ours, rule.our_shape()).to(dtype) for rule in llava.projector_rules(model)}


def combined(sources: list[Source]) -> ModelConfig:
    """The configuration of all sources together; parts that none has keep their defaults.

    Raises:
        InputError: two sources hold the same part.
    """
    holders: dict[str, Source] = {}
    for source in sources:
        for part in source.parts:
            if part in holders:
                raise InputError(
                    f"--from: {holders[part].path} and {source.path} both hold a {part} model; give one"
                )
            holders[part] = source
    sections = {part: getattr(source.model, part) for part, source in holders.items()}
    if {"language", "vision"} <= holders.keys():
        whole = holders.get("connector")
        if whole:
            sections["vision"] = _vision_features(holders["vision"], whole)
        assembly = whole.model.assembly if whole else ModelConfig().assembly
    else:
        assembly = "language" if "language" in holders else "vision"
    return ModelConfig(assembly=assembly, **sections)


def _vision_features(vision: Source, connector: Source) -> VisionConfig:
    """The encoder of a source, with the features that the connector of another was trained on."""
    found, wanted = vision.model.vision, connector.model.vision
    if found.width != wanted.width:
        raise InputError(
            f"{connector.path}: has a connector for features of width {wanted.width}, but those of"
            f" {vision.path} have {found.width}; give the encoder that it was trained with"
        )
    names = [key.partition(".")[2] for key in vision.reading.leaves_open & clip.FEATURES]
    return replace(found, **{name: getattr(wanted, name) for name in names})


def left_open(sources: list[Source]) -> set[str]:
    """Keys of the model that none of the sources says. What an encoder alone leaves open, the source of the
    connector may say."""
    connectors = [source.reading for source in sources if "connector" in source.parts]
    return {
        key
        for source in sources
        for key in source.reading.leaves_open
        if all(key in reading.leaves_open for reading in connectors)
    }
