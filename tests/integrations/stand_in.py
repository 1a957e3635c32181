"""What the plugin takes from lmms-eval 0.7, for where that is not installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any


class lmms:
    """As lmms_eval.api.model.lmms: what an evaluation sets, and finds, on a model."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size


@dataclass(frozen=True)
class ModelManifest:
    """As lmms_eval.models.registry_v2.ModelManifest."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class GenerationResult:
    """As lmms_eval.api.instance.GenerationResult."""

    text: Any
    token_counts: Any = None


def simple_parse_args_string(text: str) -> dict[str, Any]:
    """As lmms_eval.utils has it: whole numbers become numbers."""
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    return {key: int(value) if value.isnumeric() else value for key, value in pairs}


def install() -> None:
    """Put the stand-ins where Python looks for lmms_eval."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.utils": {"simple_parse_args_string": simple_parse_args_string},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__dict__.update(values, __path__=[])
        sys.modules[name] = module
