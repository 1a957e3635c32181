"""What the engine has to know about a family of published weights: how it is recognised, read and written.

A table module (`tables/<family>.py`) knows keys, shapes and configuration, and says so in its `FAMILY`;
`families.FAMILIES` lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from megamm.config import ModelConfig, Part, Recipe
from megamm.convert.rules import Shape, Table
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError


class TensorFiles(Protocol):
    """The tensors of a source by their names there; only headers have been read."""

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> Shape: ...

    def dtype(self, key: str) -> torch.dtype: ...

    def tensor(self, key: str) -> Tensor: ...


@dataclass(frozen=True)
class Found:
    """What `--from` names, before its family is known.

    Attributes:
        path: a directory, or a single file of weights (checkpoint.pt).
        config: config.json; empty where there is none.
        tensors: of all files.
    """

    path: Path
    config: dict[str, Any]
    tensors: TensorFiles

    @property
    def where(self) -> str:
        """The file that an error about the configuration names."""
        return str(self.path / "config.json" if self.config else self.path)


@dataclass(frozen=True)
class Reading:
    """How one source is read.

    Attributes:
        parts: of a model that it holds.
        model: its configuration; only the sections of `parts` mean anything.
        table: for all its keys.
        image_id: id of the image placeholder, if it names one.
        leaves_open: keys of the model ("vision.feature_layer") that only the recipe says.
        lacks_image_token: it has a connector but no token that stands for an image; one is added.
    """

    parts: tuple[Part, ...]
    model: ModelConfig
    table: Table
    image_id: Optional[int] = None
    leaves_open: frozenset[str] = frozenset()
    lacks_image_token: bool = False


@dataclass
class Target:
    """A directory that is being exported, and what goes into it.

    Attributes:
        directory: exists; the weights are written later, by the engine.
        recipe: of the checkpoint.
        tokenizer: None if the checkpoint has none; if there is one, its own files are written by the engine.
        token_ids: bos_token_id, eos_token_id, pad_token_id; empty without a tokenizer.
        image_id: id of the image placeholder, where known.
        dtype: of the weights.
        notes: what the user should know; append to it.
    """

    directory: Path
    recipe: Recipe
    tokenizer: Optional[Tokenizer]
    token_ids: dict[str, Optional[int]]
    image_id: Optional[int]
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> ModelConfig:
        return self.recipe.model

    def need_image_id(self) -> int:
        """Raises InputError if nothing says which token stands for an image."""
        if self.image_id is None:
            raise InputError(
                "--checkpoint: has no tokenizer, and its recipe no model.image_token_id; restore one"
            )
        return self.image_id


@dataclass(frozen=True)
class Export:
    """How a family is written.

    Attributes:
        parts: that it holds; other parts of the checkpoint are left out, and the user is told.
        table: the mapping of these parts; raises InputError if the family cannot express the model.
        config: the contents of config.json.
        extras: writes further files (processor, modelling file, model card).
        pickle: a further file with some of the weights, as torch.save writes it: its name and the mapping.
        only_file: name of the file of weights where the format has no shards.
        has_image_token: whether a token stands for an image; otherwise the tokenizer is written without.
    """

    parts: tuple[Part, ...]
    table: Callable[[ModelConfig], Table]
    config: Optional[Callable[[Target], dict[str, Any]]]
    extras: Callable[[Target], None] = lambda target: None
    pickle: Optional[tuple[str, Callable[[ModelConfig], Table]]] = None
    only_file: Optional[str] = None
    has_image_token: bool = True


@dataclass(frozen=True)
class Family:
    """One format of published weights.

    Attributes:
        name: as `--family` takes it.
        recognises: whether a source is of this family, by config.json or by the names of its tensors.
        read: how such a source is read. The second argument is the recipe's model if there is one, for
            what the source itself cannot say; raises InputError.
        export: None if it is only imported.
        adapts: it changes a model that other sources hold; `read` gets what these make, if no recipe.
    """

    name: str
    recognises: Callable[[Found], bool]
    read: Callable[[Found, Optional[ModelConfig]], Reading]
    export: Optional[Export] = None
    adapts: bool = False


def model_type(*names: str) -> Callable[[Found], bool]:
    """Recognise a source by the model_type in its config.json."""
    return lambda found: found.config.get("model_type") in names
