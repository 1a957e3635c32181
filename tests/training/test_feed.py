"""The feed over several processes: each copy of the model gets its share of the steps, on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.balance import UNIT
from megamm.data.loader import BatchLoader
from megamm.data.tokenizer import Tokenizer
from megamm.engine import groups
from megamm.engine.manifest import Progress
from megamm.errors import InputError
from megamm.planning.flops import flops_per_step
from megamm.training.feed import NUMBERS, BatchFeed, sample_cost
from tests.data.helpers import recipe, varied
from tests.dist.harness import run_distributed
from tests.dist.tiny import tiny_recipe

NUM_STEPS = 3


def packed_recipe(dataset: str, tokenizer: str, tensor: int, pipeline: int) -> Recipe:
    settings = recipe(Path(dataset), Path(tokenizer), sequence_length=512, pack=True)
    settings.training.global_batch_size = 16
    settings.parallel.tensor, settings.parallel.pipeline = tensor, pipeline
    return settings


def read(layout: list[int], datasets: list[str], tokenizer: str, folder: str) -> dict[str, Any]:
    """A worker: what this rank is given, and where it stands. The last data-parallel rank reads the last
    dataset."""
    settings = packed_recipe(datasets[0], tokenizer, *layout)
    place = groups.initialize(settings.parallel, torch.device("cpu"), "gloo")
    settings.data.train = datasets[-1 if place.dp_rank == place.dp_size - 1 else 0]
    found: list[tuple[int, list[Batch]]] = []
    feed, error, remarks = None, None, []
    try:
        started = Progress(1, 5)
        feed = BatchFeed(
            settings, Tokenizer.load(tokenizer), place, started, Path(folder) / "quarantine.jsonl"
        )
        assert feed.consumed_samples == 5
        for _step in range(NUM_STEPS):
            batches = feed.next_step()
            found.append((feed.consumed_samples, batches))
        remarks = feed.remarks()
    except InputError as refused:
        error = str(refused)
    finally:
        if feed is not None:
            feed.close()
        groups.shutdown()
    coordinates = (place.tp_rank, place.pp_rank, place.dp_rank)
    return {"coordinates": coordinates, "steps": found, "error": error, "remarks": remarks}


@pytest.fixture(scope="module")
def varied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path) -> Path:
    return varied(tmp_path_factory.mktemp("varied"), 90, image_folder, tokenizer_dir)


@pytest.mark.parametrize("layout", [(2, 2), (2, 1)], ids=["tensor-pipeline", "tensor-data"])
def test_every_rank_gets_its_batches(
    layout: tuple[int, int], varied_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Packed rows of varying numbers of documents, over four processes."""
    dp_size = 4 // (layout[0] * layout[1])
    arguments = {
        "layout": layout,
        "datasets": [str(varied_dir)],
        "tokenizer": str(tokenizer_dir),
        "folder": str(tmp_path),
    }
    settings = packed_recipe(str(varied_dir), str(tokenizer_dir), *layout)
    shares = []
    for dp_rank in range(dp_size):
        with BatchLoader(
            settings, Tokenizer.load(tokenizer_dir), 5, dp_rank, dp_size, None, sample_cost(settings)
        ) as loader:
            shares.append(
                [
                    ([next(loader) for _m in range(8 // dp_size)], loader.consumed_samples)
                    for _s in range(NUM_STEPS)
                ]
            )
    for result in run_distributed(4, "tests.training.test_feed:read", arguments):
        _tp_rank, pp_rank, dp_rank = result["coordinates"]
        assert result["error"] is None
        start = 5
        for (end, batches), (wanted, wanted_end) in zip(result["steps"], shares[dp_rank], strict=True):
            assert end == wanted_end and {batch.step_start for batch in batches} == {start}
            start = end
            for batch, expected in zip(batches, wanted, strict=True):
                check_same(batch, expected, with_images=pp_rank == 0)
    counts = {len(batch.sample_ids) for share in shares for step, _ in share for batch in step}
    assert len(counts) > 2, "rows of different numbers of documents"


def check_same(batch: Batch, expected: Batch, with_images: bool) -> None:
    for name in ("input_ids", "labels", "position_ids", "images_per_sample", "sample_ids"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    for name in NUMBERS:
        assert getattr(batch, name) == getattr(expected, name), name
    assert batch.packed and batch.document_lengths() == expected.document_lengths()
    if with_images:
        assert torch.equal(batch.images, expected.images)
    else:
        assert batch.images.shape == (0, *expected.images.shape[1:])


def test_readers_of_different_datasets_are_noticed(
    varied_dir: Path, dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Machines with different copies of the data would go on from different samples after a restart."""
    arguments = {
        "layout": (1, 1),
        "datasets": [str(varied_dir), str(dataset_dir)],
        "tokenizer": str(tokenizer_dir),
        "folder": str(tmp_path),
    }
    for result in run_distributed(2, "tests.training.test_feed:read", arguments):
        assert "not the same on every machine" in str(result["error"]) and not result["steps"]


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("assembly", ["merged", "cross_attention"])
def test_costs_are_the_ratio_of_flops(assembly: str, window: int | None) -> None:
    """A batch of 7 samples of any length with 3 images, in positions without attention, is what FLOPs say."""
    settings = tiny_recipe(assembly)
    settings.model.language.sliding_window = window
    cost = sample_cost(settings)
    for length in (20, settings.data.sequence_length, 200):
        costs = cost.of(np.array([length] * 7), np.array([3] + [0] * 6))
        wanted = flops_per_step(settings, 7 * length, 3, sequence_length=length)
        wanted /= flops_per_step(settings, 1, 0, num_pairs=0)
        assert 7 * length + costs.sum() / UNIT == pytest.approx(wanted, rel=1e-3)
    assert 0 < cost.attention < 0.1 < cost.image
