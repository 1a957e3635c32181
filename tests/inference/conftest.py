"""Checkpoints with random weights, and the models loaded from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from megamm.config import ParallelConfig, Recipe
from megamm.data.tokenizer import Tokenizer
from megamm.engine import checkpoint, groups
from megamm.inference import Model, load
from tests.convert.helpers import VOCAB_SIZE, train_tiny_tokenizer
from tests.dist.tiny import tiny_recipe
from tests.one_process import CPU, build, whole

ASSEMBLIES = ("merged", "cross_attention")
NUM_UNKNOWN = 11  # embeddings that the tokenizer has no tokens for


def recipe_of(assembly: str) -> Recipe:
    return tiny_recipe(
        assembly,
        {
            "model.language.vocab_size": VOCAB_SIZE + NUM_UNKNOWN,
            "model.language.max_positions": 256,
            "model.language.init_std": 0.3,
            "training.freeze": "[vision, language]",  # of no concern to inference
        },
    )


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run directory with one checkpoint for each assembly."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = train_tiny_tokenizer(root / "tokenizer")
    for assembly in ASSEMBLIES:
        recipe = recipe_of(assembly)
        layout = groups.initialize(ParallelConfig(), CPU, "gloo")
        weights = whole(build(recipe, layout, image_id=tokenizer.image_id))
        # what a trained model never says: lone bytes, <image>, ids that the tokenizer does not have
        output = weights["language.output_layer.weight"]
        output[3:259] = 0
        output[tokenizer.image_id :] = 0
        out = root / assembly / "checkpoints" / "step_00000001"
        out.parent.mkdir(parents=True)
        checkpoint.write_weights(out, weights, recipe, root / "tokenizer")
    return {assembly: root / assembly for assembly in ASSEMBLIES}


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path]) -> Iterator[dict[str, Model]]:
    yield {assembly: load(checkpoints[assembly], "cpu") for assembly in ASSEMBLIES}
    groups.shutdown()


@pytest.fixture(params=ASSEMBLIES)
def model(models: dict[str, Model], request: pytest.FixtureRequest) -> Model:
    return models[request.param]


@pytest.fixture
def tokenizer(model: Model) -> Tokenizer:
    return model.tokenizer


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Two noisy pictures of different shapes."""
    paths = []
    for index, (width, height) in enumerate([(20, 31), (16, 16)]):
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8).numpy()
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(noise).save(paths[-1])
    return paths
