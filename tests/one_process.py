"""Models in a world of one process: the groups as a fixture, models with given weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from megamm.batch import Batch
from megamm.config import ParallelConfig, Recipe
from megamm.engine import groups
from megamm.engine.groups import Groups
from megamm.engine.weights import initialize, named_shards
from megamm.models.vlm import VisionLanguageModel, build_model
from tests.dist.tiny import IMAGE_ID, draw_visible, tiny_batch

CPU = torch.device("cpu")
GATE = 0.5  # closed gates would hide the gated blocks


@pytest.fixture(scope="module")
def layout() -> Iterator[Groups]:
    """Process groups of one, for the tests of a module."""
    yield groups.initialize(ParallelConfig(), CPU, "gloo")
    groups.shutdown()


def build(
    recipe: Recipe,
    layout: Groups,
    weights: Mapping[str, torch.Tensor] | None = None,
    gate: float = GATE,
    image_id: int = IMAGE_ID,
) -> VisionLanguageModel:
    """The recipe's model with `weights`, or random ones, open gates and adapters that add something."""
    models = build_model(recipe, layout, "local", image_id)
    initialize(models, draw_visible(recipe, gate) if weights is None else lambda name, _: weights[name])
    model = models[0]
    assert isinstance(model, VisionLanguageModel)
    return model


def whole(
    model: torch.nn.Module, select: Callable[[torch.nn.Parameter], torch.Tensor | None] | None = None
) -> dict[str, torch.Tensor]:
    """The parameters (or what `select` takes of them) by checkpoint name; copies, no element missing."""
    found: dict[str, torch.Tensor] = {}
    for shard in named_shards(model, select):
        tensor = found.setdefault(shard.name, torch.full(shard.global_shape, float("nan")))
        tensor[shard.index] = shard.data.detach().reshape(tensor[shard.index].shape)
    for name, tensor in found.items():
        assert not tensor.isnan().any(), name
    return found


def merge_rows(batch: Batch, rows: list[int]) -> Batch:
    """A batch of some of the samples of `batch`."""
    images = batch.images.split(batch.images_per_sample.tolist())
    index = torch.tensor(rows)
    chosen: dict[str, Any] = {
        key: getattr(batch, key)[index]
        for key in ("input_ids", "labels", "position_ids", "images_per_sample", "sample_ids")
    }
    return replace(batch, images=torch.cat([images[row] for row in rows]), **chosen)


__all__ = ["CPU", "GATE", "build", "layout", "merge_rows", "tiny_batch", "whole"]
