"""Models to talk with: those of the tests of inference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from megamm.chat.answering import Answerer
from megamm.data.templates import Template
from megamm.inference import Model
from tests.inference.conftest import checkpoints, model, models, pictures

__all__ = ["answerer_under", "checkpoints", "model", "models", "pictures"]


@pytest.fixture
def answerer_under(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answerer]:
    """Makes an answerer whose model has the template of that name, with changes."""

    def make(name: str = "vicuna", **changes: object) -> Answerer:
        # (the default system message of Vicuna takes half of the tiny model's positions)
        changes = {"default_system": "be brief"} | changes if name == "vicuna" else changes
        monkeypatch.setattr(model, "template", dataclasses.replace(Template.by_name(name), **changes))
        return Answerer(model)

    return make
