"""The stream: the same whatever is restarted or resized, full whatever images are bad."""

from __future__ import annotations

import json
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.data.loader import BatchLoader
from megamm.data.order import sample_at, substitute_at
from megamm.data.tokenizer import Tokenizer, train_tokenizer
from megamm.errors import InputError, RunError
from tests.data.helpers import IMAGE_SIZE, entry, prepared, recipe, varied, write_images

TOKENS_PER_IMAGE = 4
AUGMENTED = {"loader": "pillow", "random_crop_scale": 0.5, "random_flip": True, "num_workers": 2}


def batches(
    settings: Recipe,
    tokenizer: Tokenizer,
    count: int,
    consumed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    quarantine: Path | None = None,
) -> list[Batch]:
    with BatchLoader(settings, tokenizer, consumed, rank, ranks, quarantine) as loader:
        return list(islice(loader, count))


def samples(found: list[Batch]) -> list[int]:
    return [int(i) for batch in found for i in batch.sample_ids]


def same(a: Batch, b: Batch) -> bool:
    tensors = ("input_ids", "labels", "position_ids", "images", "images_per_sample", "sample_ids")
    numbers = ("num_skipped", "packed", "num_padding", "num_labels", "num_pairs")
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in tensors) and all(
        getattr(a, name) == getattr(b, name) for name in numbers
    )


@pytest.fixture(scope="module")
def varied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path) -> Path:
    """60 samples of no to three images and very different lengths."""
    return varied(tmp_path_factory.mktemp("varied"), 60, image_folder, tokenizer_dir)


def test_batches_follow_the_order(dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    """Without balance sample by sample, with it step by step."""
    found = batches(recipe(dataset_dir, tokenizer_dir, balance=False), tokenizer, 32)
    settings = recipe(dataset_dir, tokenizer_dir)
    balanced = batches(settings, tokenizer, 32)
    order = [sample_at(settings.seed, settings.stage, i, 50) for i in range(64)]
    assert samples(found) == order
    for step in range(8):
        four, wanted = balanced[4 * step : 4 * step + 4], order[8 * step : 8 * step + 8]
        assert sorted(samples(four)) == sorted(wanted)
        counts = [batch.num_images for batch in four]
        assert max(counts) - min(counts) <= 1, "samples have no, one or two images"
    for batch in found + balanced:
        assert batch.input_ids.shape == (2, 128) and batch.num_skipped == 0
        assert batch.images.shape == (int(batch.images_per_sample.sum()), 3, IMAGE_SIZE, IMAGE_SIZE)
        positions = int((batch.input_ids == tokenizer.image_id).sum())
        assert positions == TOKENS_PER_IMAGE * batch.num_images


def test_labels_are_the_answers(dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    for batch in batches(recipe(dataset_dir, tokenizer_dir), tokenizer, 8):
        for sample, labels in zip(batch.sample_ids, batch.labels, strict=True):
            learnt = labels[labels != IGNORE_INDEX].tolist()
            assert tokenizer.decode(learnt, skip_special=False) == f"It is thing {int(sample)}.</s>"


def test_images_stand_in_the_order_of_their_placeholders(tmp_path: Path, tokenizer_dir: Path) -> None:
    from megamm.config import ImageConfig
    from megamm.data.images import make_image_loader

    names = write_images(tmp_path / "images", 4)
    entries = [entry(i, [names[i], names[3 - i]], "a", "b") for i in range(4)]
    data = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out
    decode = make_image_loader(ImageConfig(loader="pillow"), IMAGE_SIZE, True).load
    pixels = decode([(tmp_path / "images" / name).read_bytes() for name in names], [0] * 4)
    for batch in batches(recipe(data, tokenizer_dir), Tokenizer.load(tokenizer_dir), 4):
        for i, sample in enumerate(batch.sample_ids.tolist()):
            assert torch.equal(batch.images[2 * i], pixels[sample])  # type: ignore[arg-type]
            assert torch.equal(batch.images[2 * i + 1], pixels[3 - sample])  # type: ignore[arg-type]


def steps(
    settings: Recipe, tokenizer: Tokenizer, count: int, consumed: int = 0, ranks: int = 1
) -> list[tuple[int, list[Batch]]]:
    """The next steps: consumed samples after each, and its micro-batches, of all ranks, in one order."""
    training = settings.training
    per_rank = training.global_batch_size // training.micro_batch_size // ranks
    found: list[tuple[int, list[Batch]]] = []
    for rank in range(ranks):
        with BatchLoader(settings, tokenizer, consumed, rank, ranks, None) as loader:
            for number in range(count):
                start = loader.consumed_samples
                mine = list(islice(loader, per_rank - 1))
                assert loader.consumed_samples == start, "the step is not over"
                mine += list(islice(loader, 1))
                if rank == 0:
                    found.append((loader.consumed_samples, mine))
                else:
                    found[number][1].extend(mine)
                assert loader.consumed_samples == found[number][0]
    for _end, step in found:
        step.sort(key=lambda batch: [batch.sample_ids.tolist(), batch.input_ids.tolist()])
    return found


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("start", [0, 43, 4096 - 8])
def test_resuming_gives_the_same_stream(
    start: int, pack: bool, varied_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    """At every step of a run, on any number of ranks, also across the end of an epoch and with augmentation;
    other worker and prefetch counts change nothing."""
    settings = recipe(varied_dir, tokenizer_dir, image=AUGMENTED, pack=pack)
    other = recipe(varied_dir, tokenizer_dir, image=AUGMENTED | {"num_workers": 1}, prefetch=1, pack=pack)
    whole = steps(settings, tokenizer, 6, start)
    assert whole[-1][0] - start >= 48
    for number, ranks in ((1, 1), (2, 2), (3, 4), (5, 2)):
        rest = steps(other, tokenizer, 6 - number, whole[number - 1][0], ranks)
        for (end, step), (wanted_end, wanted) in zip(rest, whole[number:], strict=True):
            assert end == wanted_end
            assert all(same(a, b) for a, b in zip(step, wanted, strict=True))


def test_augmentation_differs_by_epoch_and_place(tmp_path: Path, tokenizer_dir: Path) -> None:
    """One sample with the same picture twice, seen 8 times: 16 crops, hardly any two alike."""
    names = write_images(tmp_path / "images", 1)
    data = prepared(tmp_path, [entry(0, names * 2, "a", "b")], tokenizer_dir, [tmp_path / "images"]).out
    settings = recipe(data, tokenizer_dir, image={"loader": "pillow", "random_crop_scale": 0.2})
    found = batches(settings, Tokenizer.load(tokenizer_dir), 4)
    assert len({float(image.sum()) for batch in found for image in batch.images}) >= 14


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_is_the_same_for_every_number_of_ranks(
    micro: int, pack: bool, varied_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    settings = recipe(varied_dir, tokenizer_dir, image=AUGMENTED, pack=pack)
    settings.training.micro_batch_size = micro
    one, two, four = (steps(settings, tokenizer, 3, 16, ranks) for ranks in (1, 2, 4))
    for (end, step), *others in zip(one, two, four, strict=True):
        for other_end, other in others:
            assert end == other_end and len(step) == len(other) == 8 // micro
            assert all(same(a, b) for a, b in zip(step, other, strict=True))


@pytest.fixture
def damaged(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """40 samples over 20 pictures; afterwards two pictures turn bad, one is gone and one has changed."""
    names = write_images(tmp_path / "images", 20)
    entries = [entry(i, names[i % 20], f"Which {i}?", f"This {i}.") for i in range(40)]
    # Written cut short from the start: the header that `prepare` looks at is good.
    cut = tmp_path / "images" / names[3]
    cut.write_bytes(cut.read_bytes()[:-30])
    report = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"])
    assert report.counts["skipped"] == 0
    (tmp_path / "images" / names[7]).unlink()
    changed = tmp_path / "images" / names[12]
    changed.write_bytes(changed.read_bytes()[:-5] + b"other")
    return report.out


@pytest.mark.parametrize("name", ["pillow", "dali"])
def test_bad_images_are_replaced(
    name: str, damaged: Path, tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    settings = recipe(damaged, tokenizer_dir, image={"loader": name}, max_bad_images=0.5)
    settings.training.micro_batch_size = 4
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    found = batches(settings, tokenizer, 20, quarantine=quarantine)
    bad_rows = {i for i in range(40) if i % 20 in (3, 7, 12)}
    wanted, replaced = [], 0
    for index in range(80):
        row, attempt = sample_at(settings.seed, settings.stage, index, 40), 0
        replaced += row in bad_rows
        while row in bad_rows:
            attempt += 1
            row = substitute_at(settings.seed, settings.stage, index, attempt, 40)
        wanted.append(row)
    assert samples(found) == wanted
    assert replaced >= 6 and sum(batch.num_skipped for batch in found) == replaced
    assert all(batch.input_ids.shape[0] == 4 == batch.num_images for batch in found)
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert len(reasons) == 3 and all({"source", "key", "reason"} <= set(line) for line in lines)
    assert "cannot be decoded" in reasons["3.png"]
    assert reasons["7.png"] == "the file is missing"
    assert "has changed" in reasons["12.jpg"]
    assert {line["source"] for line in lines} == {str(tmp_path / "images")}
    # The same after a restart in the middle, and nothing of it depends on what was recorded before.
    assert samples(batches(settings, tokenizer, 5, 40)) == wanted[40:60]


def test_too_many_bad_images_stop_the_run(
    damaged: Path, tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    settings = recipe(damaged, tokenizer_dir, max_bad_images=0.05)
    with BatchLoader(settings, tokenizer, 0, 0, 1, tmp_path / "q.jsonl") as loader:
        delivered = list(islice(loader, 49))  # 98 samples: too few to judge
        assert len(delivered) == 49
        with pytest.raises(
            RunError, match=r"of 100 samples had unreadable images, more than data.max_bad_images"
        ):
            next(loader)


def test_images_that_are_all_gone_stop_the_run(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    names = write_images(tmp_path / "images", 3)
    entries = [entry(i, names[i], "a", "b") for i in range(3)]
    data = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out
    for name in names:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(RunError, match=r"32 samples in a row have unreadable images"):
        batches(recipe(data, tokenizer_dir), tokenizer, 1)


def test_text_only(tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    data = prepared(tmp_path, [entry(i, None, f"q{i}", f"a{i}") for i in range(5)], tokenizer_dir, []).out
    for batch in batches(recipe(data, tokenizer_dir), tokenizer, 4):
        assert batch.images.shape == (0, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert batch.images_per_sample.tolist() == [0, 0]
        assert (batch.labels != IGNORE_INDEX).any()


def test_truncation_is_counted(dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    """So short a sequence has no room for the images, which stand behind the system prompt."""
    settings = recipe(dataset_dir, tokenizer_dir, sequence_length=20)
    with BatchLoader(settings, tokenizer, 0, 0, 1, None) as loader:
        for batch in islice(loader, 25):
            assert batch.num_images == 0 and (batch.labels == IGNORE_INDEX).all()
            assert batch.num_skipped == 0
        stats = loader.stats
    assert stats.truncated == stats.without_loss == stats.samples >= 50
    assert stats.dropped_images >= 51


def test_cross_attention_keeps_one_token_per_image(
    dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    settings = recipe(dataset_dir, tokenizer_dir)
    settings.model.assembly = "cross_attention"
    for batch in batches(settings, tokenizer, 4):
        assert int((batch.input_ids == tokenizer.image_id).sum()) == batch.num_images


def wrong_recipes(dataset_dir: Path, tokenizer_dir: Path) -> list[tuple[Any, int, str]]:
    def with_vocabulary(settings: Recipe) -> None:
        settings.model.language.vocab_size = 100

    def without_data(settings: Recipe) -> None:
        settings.data.train = None

    def elsewhere(settings: Recipe) -> None:
        settings.data.train = "/nowhere"

    return [
        (with_vocabulary, 1, "model.language.vocab_size: is 100, less than the 420 ids"),
        (without_data, 1, "data.train: is not set"),
        (elsewhere, 1, "/nowhere: is no prepared dataset"),
        (lambda settings: None, 3, "training.global_batch_size: 8 is no multiple"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_wrong_recipes(number: int, dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    change, ranks, message = wrong_recipes(dataset_dir, tokenizer_dir)[number]
    settings = recipe(dataset_dir, tokenizer_dir)
    change(settings)
    with pytest.raises(InputError, match=message):
        BatchLoader(settings, tokenizer, 0, 0, ranks, None)


def test_another_tokenizer_is_refused(dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    other = train_tokenizer(["Some other text altogether."] * 9, tmp_path, 300)
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        BatchLoader(recipe(dataset_dir, tokenizer_dir), other, 0, 0, 1, None)


def test_errors_of_the_background_surface(
    dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = BatchLoader(recipe(dataset_dir, tokenizer_dir, prefetch=1), tokenizer, 0, 0, 1, None)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(loader.dataset, "read_image", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        for _ in range(10):
            next(loader)
    assert list(loader) == []  # closed


def test_closing_leaves_no_threads(dataset_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    before = threading.active_count()
    for _ in range(3):
        loader = BatchLoader(recipe(dataset_dir, tokenizer_dir, image=AUGMENTED), tokenizer, 0, 0, 1, None)
        next(loader)
        loader.close()
        loader.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
