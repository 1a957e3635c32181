"""Several datasets as one: which sample comes when, which share a step, and when a run may go on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megamm.config import DataConfig, ModelConfig, Recipe, SourceConfig, TrainingConfig
from megamm.data.blend import Blend
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.indexed import PreparedDataset
from megamm.data.order import samples_at, substitute_at
from megamm.data.resume_blend import resumed_position
from megamm.data.row_kinds import ROWS_PER_BLOCK, RowsOfKind, split_by_kind
from megamm.errors import InputError
from tests.data.helpers import varied

SEED = 3


class Sizes:
    """A dataset of which only the numbers of images are known."""

    def __init__(self, images: np.ndarray) -> None:
        self._images, self.num_images = images, int(images.sum())
        self.manifest = SimpleNamespace(files={"images": SimpleNamespace(sha256=images.tobytes())})

    def __len__(self) -> int:
        return len(self._images)

    def sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.full(len(rows), 9), self._images[rows]


def blend(images: list[np.ndarray], pure: bool = False, batch: int = 1, **keys: list[Any]) -> Blend:
    """Sources with these numbers of images per sample; each key has a value for each of them."""
    sources = [
        SourceConfig(f"s{i}", **{key: values[i] for key, values in keys.items()}) for i in range(len(images))
    ]
    data = DataConfig(sources, sequence_length=64, pure_batches=pure)
    parts: list[Any] = [Sizes(counts) for counts in images]
    training = TrainingConfig(global_batch_size=batch)
    recipe = Recipe(
        "test", "unused", "unused", ModelConfig(), stage="align", seed=SEED, data=data, training=training
    )
    return Blend(ConcatenatedDataset(parts), recipe)


def draw(size: int, seed: int = 0) -> np.ndarray:
    """Runs of samples with and without images."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.integers(0, 3, size), rng.geometric(0.06, size))[:size]


def test_one_source_has_the_order_of_its_stage() -> None:
    """Whatever it is called, and with other weights."""
    for given in ({}, {"weight": [3.0]}, {"epochs": [0.5]}, {"name": ["x"]}):
        (group,) = blend([draw(50)], **given).groups
        assert np.array_equal(group.samples(30, 90), samples_at(SEED, "align", 30, 90, 50))
        wanted = [substitute_at(SEED, "align", 7, n, 50) for n in (1, 2, 9)]
        assert group.substitutes(7, [1, 2, 9]).tolist() == wanted and group.key == "align"


def test_epochs_are_exact() -> None:
    """Sources of 40, 25 and 7 samples, twice, once and three times as often as their size says."""
    sizes, epochs = [40, 25, 7], [2.0, 1.0, 3.0]
    (group,) = blend([np.zeros(size, int) for size in sizes], epochs=epochs).groups
    cycle = sum(int(e * n) for e, n in zip(epochs, sizes, strict=True))
    starts = np.cumsum([0, *sizes])
    for begin in (0, cycle, 5 * cycle):
        rows = group.samples(begin, cycle)
        for number, times in enumerate(epochs):
            mine = rows[(rows >= starts[number]) & (rows < starts[number + 1])] - starts[number]
            size = sizes[number]
            for once in mine.reshape(int(times), size):  # every sample once before any comes again
                assert sorted(once) == list(range(size))
    orders = [tuple(group.samples(at, 1)[0] for at in range(begin, begin + 72)) for begin in (0, cycle)]
    assert orders[0] != orders[1]
    half = blend([np.zeros(40, int), np.zeros(5, int)], epochs=[0.5, 1.0]).groups[0]
    assert half.apportionment.cycle == 5 and half.apportionment.counts == [4, 1]


def test_without_rates_each_counts_as_one_epoch_and_weights_are_shares() -> None:
    images = [np.zeros(30, int), np.zeros(10, int)]
    assert blend(images).groups[0].apportionment.counts == [3, 1]
    weighted = blend(images, weight=[0.2, 0.6]).groups[0]
    assert weighted.apportionment.counts == [1, 3]
    drawn = weighted.substitutes(5, range(1, 2001))
    assert 0.7 < (drawn >= 30).mean() < 0.8 and len(set(drawn.tolist())) == 40


def test_rows_of_a_kind_are_found_without_a_list() -> None:
    """Also behind another source, in blocks that are not full, and where a block has none."""
    for size in (1, 63, 64, 65, 200, 5000):
        images = draw(size, size)
        dataset: Any = Sizes(images)
        found = split_by_kind(dataset, 37)
        for kind, wanted in (("images", images > 0), ("text", images == 0)):
            rows = found.get(kind, range(0))  # type: ignore[call-overload]
            assert len(rows) == wanted.sum()
            if isinstance(rows, RowsOfKind):
                assert np.array_equal(rows.at(np.arange(len(rows))), 37 + np.flatnonzero(wanted))
            elif len(rows):
                assert rows == range(37, 37 + size)
    assert isinstance(found["text"], RowsOfKind) and len(found["text"]._before) <= size / ROWS_PER_BLOCK + 2


def test_groups_share_no_step_and_have_their_shares() -> None:
    images = [draw(300), np.zeros(90, int), draw(200, 1)]
    of = blend(images, pure=True, weight=[5.0, 1.0, 2.0], sequence_length=[32, None, 32])
    shown = [(g.sequence_length, [(p.source, p.kind) for p in g.parts]) for g in of.groups]
    assert shown == [
        (32, [("s0", "images"), ("s2", "images")]),
        (32, [("s0", "text"), ("s2", "text")]),
        (64, [("s1", "text")]),
    ]
    counts = np.concatenate(images)
    position, steps = (0,) * 3, []
    for _step in range(400):
        number = of.next_group(position)
        rows = of.groups[number].samples(position[number], 8)
        assert ((counts[rows] > 0) == (number == 0)).all()
        assert ((rows >= 300) & (rows < 390)).all() == (number == 2)
        assert ((counts[of.groups[number].substitutes(3, range(1, 20))] > 0) == (number == 0)).all()
        steps.append(number)
        position = tuple(used + 8 * (number == i) for i, used in enumerate(position))
    shares = np.array([float(group.share) for group in of.groups]) / 8
    assert shares.sum() == pytest.approx(1) and shares[2] == 0.125
    used = np.cumsum(np.array(steps)[:, None] == np.arange(3), axis=0)
    assert (abs(used - np.arange(1, 401)[:, None] * shares) <= 2).all()
    keys = {part.key for group in of.groups for part in group.parts} | {group.key for group in of.groups}
    assert len(keys) == 5 + 3


def test_a_rare_group_does_not_come_early() -> None:
    """One sample with images in 400: a step of 64 copies of it stands for 64 epochs."""
    images = np.zeros(400, int)
    images[7] = 1
    of = blend([images], pure=True, batch=64)
    assert [len(group.parts[0].rows) for group in of.groups] == [1, 399]
    position, early = (0, 0), []
    for _step in range(1000):
        number = of.next_group(position)
        position = tuple(used + 64 * (number == i) for i, used in enumerate(position))
        early.append(position[0] - sum(position) / 400)
    assert max(early) <= 32 and min(early) >= -32 and position[0] in (128, 192)


def test_substitutes_come_from_all_sources_of_a_long_cycle() -> None:
    """Sizes without a common factor make a cycle that 64 bits cannot count."""
    sizes = [10_007, 10_009, 10_037, 10_039, 10_061]
    images = [(np.arange(size) > 0).astype(int) for size in sizes]
    group = blend(images, pure=True, weight=[1.0] * 5).groups[0]
    assert len(group.parts) == 5 and group.apportionment.cycle > 1 << 65
    rows = group.substitutes(3, range(1, 400))
    assert np.bincount(np.searchsorted(np.cumsum(sizes), rows, side="right"), minlength=5).min() > 50


def test_concatenation_reads_as_its_datasets_do(
    tmp_path: Path, dataset_dir: Path, tokenizer_dir: Path, image_folder: Path
) -> None:
    other = varied(tmp_path, 20, image_folder, tokenizer_dir)
    parts = [PreparedDataset(path) for path in (other, dataset_dir, other)]
    data = DataConfig([SourceConfig(str(path)) for path in (other, dataset_dir, other)])
    whole = ConcatenatedDataset.open(data)
    assert len(whole) == 90 and whole.num_images == sum(part.num_images for part in parts)
    rows = [(part, row) for part in parts for row in range(len(part))]
    tokens, images = whole.sizes(np.arange(90))
    seen = 0
    for number, (part, row) in enumerate(rows):
        stored, wanted = whole[number], part[row]
        assert np.array_equal(stored.tokens, wanted.tokens) and np.array_equal(stored.learnt, wanted.learnt)
        assert (tokens[number], images[number]) == (len(wanted.tokens), len(wanted.images))
        assert whole.origin(number) == (part.directory, row)
        assert stored.images == range(seen, seen := seen + len(wanted.images))
        for here, there in zip(stored.images, wanted.images, strict=True):
            assert whole.read_image(here) == part.read_image(there)
            assert whole.location(here) == part.location(there)
            assert whole.image_source(here) == str(image_folder)
    prints = whole.fingerprints()
    assert prints[0] == prints[2] != prints[1]
    whole.check()
    whole.close()


TWO = {"sequence_length": [32, 64], "weight": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("images", "pure", "keys", "parts"),
    [
        (
            [50, 50, 9],
            False,
            {"sequence_length": [32, 64, 64], "weight": [1.0, 2.0, 1.0]},
            ["not trained on s2"],
        ),
        ([50], False, {}, ["trained on s1 too"]),
        ([50, 50], False, TWO | {"weight": [1.0, 3.0]}, ["s0", "1/3 of all weights", "now has 1/4"]),
        ([50, 50], False, {"sequence_length": [32, 64], "epochs": [1.0, 2.0]}, ["of all epochs"]),
        ([50, 50], False, TWO | {"sequence_length": [64, 64]}, ["s1 shared its steps with other sources"]),
        ([50, 50], True, TWO, ["data.pure_batches"]),
    ],
)
def test_a_run_does_not_go_on_with_other_sources(
    images: list[int], pure: bool, keys: dict[str, list[Any]], parts: list[str]
) -> None:
    saved = blend([draw(50), draw(50)], **TWO).contents()
    now = blend([draw(size) for size in images], pure, **keys)
    with pytest.raises(InputError) as caught:
        resumed_position(now, [8, 16], saved)
    for part in ["data.train: ", "training.init_from", *parts]:
        assert part in str(caught.value)


def test_a_run_does_not_go_on_with_its_sources_in_another_order() -> None:
    """In one group they take turns in that order."""
    saved = blend([draw(50), draw(60)]).contents()
    with pytest.raises(InputError, match=r"stood in another order \(s0, s1\), so the run cannot go on"):
        resumed_position(blend([draw(60), draw(50)], name=["s1", "s0"]), [8], saved)


def test_a_run_goes_on_where_nothing_that_matters_changed() -> None:
    two = blend([draw(50), draw(50)], **TWO)
    saved = two.contents()
    assert resumed_position(two, [8, 16], saved) == ((8, 16), [])
    assert resumed_position(two, 0, []) == ((0, 0), []) == resumed_position(two, [], [])
    more = blend([draw(50), draw(60)], **TWO | {"weight": [2.0, 4.0], "sequence_length": [16, 64]})
    position, (remark,) = resumed_position(more, [8, 16], saved)
    assert position == (8, 16) and "s1 had 50 samples" in remark and "60 now" in remark
    other, (remark,) = resumed_position(blend([draw(50), draw(50, seed=1)], **TWO), [8, 16], saved)
    assert other == (8, 16) and remark.startswith("s1 was prepared otherwise")
    one, renamed = blend([draw(50)]), blend([draw(50)], name=["x"], weight=[3.0])
    assert resumed_position(renamed, [8], one.contents()) == ((8,), [])
    assert resumed_position(one, 8, []) == ((8,), []), "an older checkpoint"
    with pytest.raises(InputError, match=r"form 2 groups .* counts 1"):
        resumed_position(two, 8, [])
