"""Cases drawn at random: a stream that stops anywhere and goes on with other ranks and workers is the stream
that never stopped, to the bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megamm.batch import Batch
from megamm.config import Recipe, SourceConfig
from megamm.data.blend import Blend, Position
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.loader import BatchLoader
from megamm.data.tokenizer import Tokenizer
from tests.data.helpers import entry, prepared, recipe, varied, write_images

Step = tuple[Position, list[Batch]]  # the position after it, and the micro-batches of all ranks
STEPS = 7


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path) -> list[Path]:
    """Mixed, text alone, images alone, few samples, and one of whose pictures a quarter is gone."""
    root = tmp_path_factory.mktemp("datasets")
    names = sorted(path.name for path in image_folder.iterdir())
    text = [entry(i, None, f"Number {i}?", "So. " * (1 + i % 9)) for i in range(41)]
    images = [entry(i, [names[i % 12]] * (1 + i % 3), f"And {i}?", "Yes. " * (1 + i % 7)) for i in range(53)]
    folder = root / "images"
    gone = [
        entry(i, n, f"Which {i}?", "This. " * (1 + i % 5)) for i, n in enumerate(write_images(folder, 24))
    ]
    found = [
        varied(root / "mixed", 90, image_folder, tokenizer_dir),
        prepared(root / "text", text, tokenizer_dir, [image_folder]).out,
        prepared(root / "pairs", images, tokenizer_dir, [image_folder]).out,
        varied(root / "few", 7, image_folder, tokenizer_dir),
        prepared(root / "gone", gone, tokenizer_dir, [folder]).out,
    ]
    for number in range(0, 24, 4):
        next(folder.glob(f"{number}.*")).unlink()
    return found


def drawn_recipe(rng: np.random.Generator, datasets: list[Path], tokenizer: Path) -> Recipe:
    sources, kind = [], str(rng.choice(["weight", "epochs", ""]))
    for number in rng.permutation(len(datasets))[: rng.integers(1, 5)]:
        length, rate = rng.choice([0, 64, 160]), float(rng.choice([0.1, 0.25, 1, 1.5, 3]))
        keys: dict[str, Any] = {"sequence_length": int(length) or None} | ({kind: rate} if kind else {})
        sources.append(SourceConfig(str(datasets[number]), name=str(number), **keys))
    image = {"loader": "pillow", "random_flip": True, "random_crop_scale": float(rng.choice([0.5, 1.0]))}
    found = recipe(
        datasets[0],
        tokenizer,
        image=image,
        sequence_length=int(rng.choice([96, 200])),
        max_images=int(rng.integers(1, 5)),
        max_bad_images=1.0,
        **{key: bool(rng.integers(2)) for key in ("pack", "balance", "pure_batches")},
    )
    found.seed = int(rng.integers(100))
    found.training.micro_batch_size = int(rng.choice([1, 2]))
    alone = len(sources) == 1 and rng.integers(2)
    found.data.train = sources[0].path if alone else sources
    return found


def drawn_start(rng: np.random.Generator, settings: Recipe) -> Position:
    """The start, or a position that a long run may have."""
    dataset = ConcatenatedDataset.open(settings.data)
    groups = Blend(dataset, settings).groups
    shares = np.array([float(group.share) for group in groups])
    used = rng.choice([0, 130, 10**6]) * shares / shares.sum()
    return tuple(int(number) for number in used + (used > 0) * rng.integers(0, 9, len(used)))


def other_loading(rng: np.random.Generator, settings: Recipe, workers: list[int]) -> Recipe:
    """The same stream, loaded by others."""
    image = replace(settings.data.image, num_workers=int(rng.integers(1, 4)))
    data = replace(
        settings.data, image=image, prefetch=int(rng.integers(1, 6)), workers=int(rng.choice(workers))
    )
    return replace(settings, data=data)


def stream(
    settings: Recipe,
    tokenizer: Tokenizer,
    start: Position,
    count: int,
    ranks: int,
    trained_on: list[dict[str, Any]],
) -> list[Step]:
    per_rank = settings.training.global_batch_size // settings.training.micro_batch_size // ranks
    found: list[Step] = []
    for rank in range(ranks):
        with BatchLoader(settings, tokenizer, start, rank, ranks, None, trained_on=trained_on) as loader:
            for number in range(count):
                mine = list(islice(loader, per_rank))
                if rank == 0:
                    found.append((loader.position, mine))
                else:
                    found[number][1].extend(mine)
                    assert loader.position == found[number][0]
    for _end, batches in found:
        batches.sort(key=lambda batch: (batch.sample_ids.tolist(), batch.images.numpy().tobytes()))
    return found


def assert_same(a: Batch, b: Batch) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def check_case(seed: int, datasets: list[Path], tokenizer_dir: Path, workers: list[int]) -> set[str]:
    """Returns what the case had in it."""
    rng, tokenizer = np.random.default_rng(seed), Tokenizer.load(tokenizer_dir)
    settings = drawn_recipe(rng, datasets, tokenizer_dir)
    start = drawn_start(rng, settings)
    with BatchLoader(settings, tokenizer, start, 0, 1, None) as loader:
        contents = loader.planner.blend.contents()
    whole = stream(settings, tokenizer, start, STEPS, 1, contents)
    for ranks in rng.permutation([1, 2, 4])[:2].tolist():
        stop = int(rng.integers(0, STEPS))
        resumed = whole[stop - 1][0] if stop else start
        loading = other_loading(rng, settings, workers)
        rest = stream(loading, tokenizer, resumed, STEPS - stop, ranks, contents)
        for (end, batches), (wanted_end, wanted) in zip(rest, whole[stop:], strict=True):
            assert end == wanted_end and len(batches) == len(wanted)
            for one, other in zip(batches, wanted, strict=True):
                assert_same(one, other)
    for end, batches in whole:
        assert len({batch.input_ids.shape for batch in batches}) == 1, "one length in a step"
        if settings.data.pure_batches and not any(batch.num_skipped for batch in batches):
            assert len({bool(n) for batch in batches for n in images_of(batch, settings)}) <= 1, end
    has = {f"{len(contents)} parts", f"{len(start)} groups"}
    has |= {key for key in ("pack", "balance", "pure_batches") if getattr(settings.data, key)}
    return has | {"bad images" for _, batches in whole for batch in batches if batch.num_skipped}


def images_of(batch: Batch, settings: Recipe) -> list[int]:
    """How many images the samples of a batch have in their datasets."""
    dataset = ConcatenatedDataset.open(settings.data)
    return dataset.sizes(batch.sample_ids.numpy())[1].tolist()


def test_any_stream_goes_on_anywhere(datasets: list[Path], tokenizer_dir: Path) -> None:
    had: set[str] = set()
    for seed in range(16):
        had |= check_case(seed, datasets, tokenizer_dir, [0] if seed % 12 else [2])
    assert had >= {"1 parts", "2 groups", "3 groups", "pack", "balance", "pure_batches", "bad images"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1150))
def test_many_streams_go_on_anywhere(seed: int, datasets: list[Path], tokenizer_dir: Path) -> None:
    check_case(seed, datasets, tokenizer_dir, [0, 1, 2, 3, 4])
