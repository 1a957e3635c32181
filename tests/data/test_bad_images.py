"""One sample in twenty has a picture of a kind that collections from the web hold: who skips which."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest

from megamm.config import Recipe
from megamm.data import workers
from megamm.data.indexed import PreparedDataset
from megamm.data.loader import BatchLoader
from megamm.data.order import sample_at, substitute_at
from megamm.data.tokenizer import Tokenizer
from megamm.errors import RunError
from tests.data import deadly
from tests.data.bad_images import MAX_PIXELS, unusable, unusual
from tests.data.helpers import encode, entry, picture, prepared, recipe
from tests.data.test_loader import batches, samples

EVERY = 20
MICRO = 4


class Planted(NamedTuple):
    """A dataset of `count` samples with one image each; those of `bad` (sample -> name) are unusable."""

    directory: Path
    images: Path
    count: int
    bad: dict[int, str]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Planted:
    """All pictures are good when the dataset is made, and deadly.py takes away the check that would notice
    the change: this is about what decoders make of them, not about `prepare`."""
    root, bad, odd = tmp_path_factory.mktemp("planted"), list(unusable().values()), list(unusual().values())
    images, count = root / "images", EVERY * len(bad)
    images.mkdir()
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (images / name).write_bytes(encode(picture(i % 7, 90, 70), ("JPEG", "PNG")[i % 2]))
    entries = [entry(i, names[i], f"Which {i}?", f"This {i}.") for i in range(count)]
    directory = prepared(root, entries, tokenizer_dir, [images]).out
    for i, data in enumerate(bad):
        (images / names[EVERY * i]).write_bytes(data)
        (images / names[EVERY * i + 1]).write_bytes(odd[i % len(odd)])
    return Planted(directory, images, count, {EVERY * i: names[EVERY * i] for i in range(len(bad))})


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images may have changed since `prepare`, here and in the workers."""
    monkeypatch.setattr(workers, "PROGRAM", deadly.PROGRAM)
    monkeypatch.setattr(PreparedDataset, "read_image", deadly.read_unchecked)


def planted_recipe(
    planted: Planted, tokenizer_dir: Path, name: str, scaled: bool | None, count: int, most: float = 0.5
) -> Recipe:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    image = {"loader": name, "scaled_decode": scaled, "max_pixels": MAX_PIXELS}
    settings = recipe(
        planted.directory, tokenizer_dir, image=image, workers=count, max_bad_images=most, balance=False
    )
    settings.training.micro_batch_size = settings.training.global_batch_size = MICRO
    return settings


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("name", "scaled", "count"),
    [
        ("pillow", True, 0),
        ("pillow", False, 2),
        ("dali", False, 0),
        ("dali", True, 2),
        slow("pillow", False, 0),
        slow("pillow", True, 2),
        slow("dali", True, 0),
        slow("dali", False, 2),
    ],
)
def test_an_epoch_skips_what_was_planted(
    name: str,
    scaled: bool,
    count: int,
    planted: Planted,
    tokenizer_dir: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    settings, quarantine = planted_recipe(planted, tokenizer_dir, name, scaled, count), tmp_path / "q.jsonl"
    wanted = []
    for index in range(planted.count):
        row, draw = sample_at(settings.seed, settings.stage, index, planted.count), 0
        while row in planted.bad:
            draw += 1
            row = substitute_at(settings.seed, settings.stage, index, draw, planted.count)
        wanted.append(row)
    found = batches(settings, tokenizer, planted.count // MICRO, quarantine=quarantine)
    assert samples(found) == wanted
    assert all(len(batch.input_ids) == MICRO == batch.num_images for batch in found)
    assert sum(batch.num_skipped for batch in found) == len(planted.bad) == planted.count / EVERY
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == sorted(planted.bad.values())
    assert all(line["source"] == str(planted.images) and line["reason"] for line in lines)


@pytest.mark.usefixtures("unchecked")
def test_an_image_stands_in_the_quarantine_once(
    planted: Planted, tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Although two ranks at a time and a later run meet it, and a line was cut short by a crash."""
    settings, quarantine = planted_recipe(planted, tokenizer_dir, "pillow", None, 0), tmp_path / "q.jsonl"
    settings.training.global_batch_size = 2 * MICRO
    quarantine.write_text('{"source": "elsewhere", "key": "a.jpg", "reason": "r"}\n{"source": "cut sh')
    steps = planted.count // (2 * MICRO) + 1
    with (
        BatchLoader(settings, tokenizer, 0, 0, 2, quarantine) as first,
        BatchLoader(settings, tokenizer, 0, 1, 2, quarantine) as second,
    ):
        for _ in range(2 * steps):
            next(first), next(second)
    batches(settings, tokenizer, steps, quarantine=quarantine)
    first_line, cut, *lines = quarantine.read_text().splitlines()
    assert "a.jpg" in first_line and cut == '{"source": "cut sh'
    assert sorted(json.loads(line)["key"] for line in lines) == sorted(planted.bad.values())


@pytest.mark.usefixtures("unchecked")
def test_too_many_stop_the_run_of_workers(
    planted: Planted, tokenizer_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    settings = planted_recipe(planted, tokenizer_dir, "pillow", None, 2, most=0.01)
    with (
        BatchLoader(settings, tokenizer, 0, 0, 1, tmp_path / "q.jsonl") as loader,
        pytest.raises(RunError, match=r"unreadable images, more than data.max_bad_images = 0.01"),
    ):
        list(islice(loader, planted.count // MICRO))
