"""Packed rows as they come out of the loader: whole samples side by side, also where images are bad."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.data.assemble import Assembler
from megamm.data.balance import Cost
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.indexed import PreparedDataset
from megamm.data.loader import BatchLoader
from megamm.data.order import sample_at, substitute_at
from megamm.data.step_plan import Place, StepPlanner
from megamm.data.tokenizer import Tokenizer
from tests.data import documents
from tests.data.helpers import entry, prepared, recipe, varied, write_images

S, PER_IMAGE = 256, 4


@pytest.fixture(scope="module")
def varied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, image_folder: Path) -> Path:
    return varied(tmp_path_factory.mktemp("varied"), 60, image_folder, tokenizer_dir)


def split(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of the documents of a row, without the padding."""
    assert batch.packed and batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (
        1,
        2 * S,
    )
    lengths = batch.document_lengths()
    assert sum(lengths) == 2 * S
    assert batch.position_ids[0].tolist() == [i for length in lengths for i in range(length)]
    pieces = zip(batch.input_ids[0].split(lengths), batch.labels[0].split(lengths), strict=True)
    found = [(ids.tolist(), labels.tolist()) for ids, labels in pieces]
    if batch.num_padding:
        ids, labels = found.pop()
        assert len(ids) == batch.num_padding and len(set(ids)) == 1 and set(labels) == {IGNORE_INDEX}
    assert len(found) == len(batch.sample_ids)
    assert all(labels[-1] == IGNORE_INDEX for _, labels in found), "a label crosses into the next document"
    return found


def document(
    dataset: PreparedDataset, tokenizer: Tokenizer, sample: int, length: int = S, images: int = 8
) -> documents.Document:
    stored = dataset[sample]
    assembler = Assembler(PER_IMAGE, tokenizer.image_id, tokenizer.pad_id)
    return documents.document(assembler, stored.tokens, stored.learnt, length, images)


def test_rows_hold_the_samples_of_the_epochs(
    varied_dir: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    settings = recipe(varied_dir, tokenizer_dir, sequence_length=S, pack=True)
    dataset, seen, used, positions, end = PreparedDataset(varied_dir), [], 0, 0, 0
    with BatchLoader(settings, tokenizer, 0, 0, 1, None) as loader:
        while end < 2 * 60:
            step: list[int] = []
            for batch in islice(loader, 4):
                found = split(batch)
                wanted = [document(dataset, tokenizer, int(sample)) for sample in batch.sample_ids]
                assert found == [(d.input_ids.tolist(), d.labels.tolist()) for d in wanted]
                assert batch.images_per_sample.tolist() == [sum(d.num_images for d in wanted)]
                assert batch.num_images == int(batch.images_per_sample) <= 2 * 8
                assert int((batch.input_ids == tokenizer.image_id).sum()) == PER_IMAGE * batch.num_images
                step += batch.sample_ids.tolist()
                used, positions = used + 2 * S - batch.num_padding, positions + 2 * S
            assert loader.consumed_samples == end + len(step) and len(step) > 8
            order = [sample_at(settings.seed, settings.stage, i, 60) for i in range(end, end + len(step))]
            assert sorted(step) == sorted(order)
            seen, end = seen + step, loader.consumed_samples
        assert loader.stats.positions >= positions and loader.stats.truncated == 0
        assert 0 < loader.stats.padding < 0.15 * loader.stats.positions
    assert used / positions > 0.85
    assert {seen.count(sample) for sample in range(60)} <= {2, 3}


def planned(settings: Recipe, tokenizer: Tokenizer, count: int) -> list[list[list[Place]]]:
    """Places of the first steps."""
    dataset = ConcatenatedDataset.open(settings.data)
    assembler = Assembler(PER_IMAGE, tokenizer.image_id, tokenizer.pad_id)
    planner, consumed, found = StepPlanner(dataset, assembler, settings, Cost()), (0,), []
    for _step in range(count):
        plan = planner.plan(consumed)
        found.append(plan.of_rank(0, 1))
        consumed = plan.end
    return found


def test_substitutes_fit_into_the_place(tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    """The first drawn one that fits and is good itself; nothing else of the step changes."""
    names = write_images(tmp_path / "images", 20)
    draw = np.random.default_rng(3)
    entries = [
        entry(
            i, [names[i % 20]] * int(draw.integers(1, 3)), f"Which {i}?", "This. " * int(draw.integers(1, 9))
        )
        for i in range(40)
    ]
    data = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out
    for bad in (3, 7, 12):
        (tmp_path / "images" / names[bad]).unlink()
    settings = recipe(data, tokenizer_dir, sequence_length=S, pack=True, max_bad_images=0.5)
    dataset, replaced, not_first = PreparedDataset(data), 0, 0
    needs = [document(dataset, tokenizer, sample) for sample in range(40)]
    with BatchLoader(settings, tokenizer, 0, 0, 1, tmp_path / "q.jsonl") as loader:
        for step in planned(settings, tokenizer, 5):
            for places, batch in zip(step, islice(loader, len(step)), strict=True):
                assert len(split(batch)) == len(places)
                wanted = []
                for place in places:
                    sample, number = place.sample, 0
                    replaced += sample % 20 in (3, 7, 12)
                    while sample % 20 in (3, 7, 12):
                        number += 1
                        sample = substitute_at(settings.seed, settings.stage, place.index, number, 40)
                        d = needs[sample]
                        if len(d.input_ids) > place.length or d.num_images > place.images:
                            sample, not_first = 3, not_first + 1  # the next one
                    wanted.append(sample)
                assert batch.sample_ids.tolist() == wanted
                assert [ids for ids, _ in split(batch)] == [needs[s].input_ids.tolist() for s in wanted]
                assert batch.num_images == sum(needs[s].num_images for s in wanted)
    assert replaced >= 6 and not_first >= 3
    assert loader.stats.truncated == 0


def test_a_substitute_is_cut_where_none_fits(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    """All samples with images are of one length, but for the bad one, which is shorter."""
    names = write_images(tmp_path / "images", 4)
    entries = [entry(i, names[i], "Which?", "It is long. " * (4 * (i > 0))) for i in range(4)]
    data = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"]).out
    (tmp_path / "images" / names[0]).unlink()
    settings = recipe(data, tokenizer_dir, sequence_length=S, pack=True, max_bad_images=0.5)
    dataset, cut = PreparedDataset(data), 0
    with BatchLoader(settings, tokenizer, 0, 0, 1, None) as loader:
        for step in planned(settings, tokenizer, 3):
            for places, batch in zip(step, islice(loader, len(step)), strict=True):
                for place, sample, (ids, labels) in zip(
                    places, batch.sample_ids.tolist(), split(batch), strict=True
                ):
                    if place.sample:
                        assert sample == place.sample
                        continue
                    drawn = (
                        substitute_at(settings.seed, settings.stage, place.index, n, 4) for n in range(1, 99)
                    )
                    assert sample == next(s for s in drawn if s)
                    whole = document(dataset, tokenizer, sample)
                    assert len(ids) == place.length < len(whole.input_ids)
                    assert ids == whole.input_ids.tolist()[: place.length] and labels[-1] == IGNORE_INDEX
                    cut += 1
        assert 0 < cut <= loader.stats.truncated
