"""Plans of steps over made-up datasets: which samples, in which micro-batches, on which rank."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from megamm.config import DataConfig, ModelConfig, Recipe, TrainingConfig
from megamm.data.assemble import Assembler
from megamm.data.balance import UNIT, Cost
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.indexed import Sample
from megamm.data.order import samples_at
from megamm.data.step_plan import StepPlan, StepPlanner
from tests.data.documents import document

IMAGE, PER_IMAGE, S, MAX_IMAGES = 9, 5, 64, 3


class MadeUpDataset:
    """Samples of 2 to 90 tokens with no to five images, more of both than fits into a row."""

    def __init__(self, size: int) -> None:
        draw = np.random.default_rng(size)
        self.images = np.maximum(draw.geometric(0.4, size) - 1, 0).clip(max=5)
        lengths = np.minimum(2 + self.images + np.exp(draw.normal(2.3, 0.9, size)).astype(np.int64), 90)
        self.tokens = [np.full(length, 1) for length in lengths]
        for tokens, count in zip(self.tokens, self.images, strict=True):
            tokens[draw.permutation(len(tokens))[:count]] = IMAGE
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_images(self) -> int:
        return int(self.images.sum())

    def __getitem__(self, row: int) -> Sample:
        self.num_read += 1
        return Sample(self.tokens[row], np.ones(len(self.tokens[row]), np.uint8), range(self.images[row]))

    def sizes(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.array([len(self.tokens[row]) for row in rows]), self.images[rows]


def planner(
    dataset: MadeUpDataset, micro: int = 2, rows: int = 32, pack: bool = True, balance: bool = True
) -> StepPlanner:
    data = DataConfig("made up", sequence_length=S, pack=pack, balance=balance, max_images=MAX_IMAGES)
    training = TrainingConfig(global_batch_size=rows, micro_batch_size=micro)
    recipe = Recipe("test", "unused", "unused", ModelConfig(), data=data, training=training)
    parts: list[Any] = [dataset]
    return StepPlanner(
        ConcatenatedDataset(parts), Assembler(PER_IMAGE, IMAGE, 0), recipe, Cost(image=32.0, attention=0.01)
    )


def plans(of: StepPlanner, count: int, consumed: int = 0) -> list[StepPlan]:
    found = []
    for _step in range(count):
        found.append(of.plan((consumed,)))
        (consumed,) = found[-1].end
    return found


def indices(plan: StepPlan) -> list[int]:
    return [place.index for place in chain.from_iterable(plan.micro_batches)]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("size", [37, 1000])
def test_every_sample_once_per_epoch_in_order(size: int, pack: bool) -> None:
    """Also where a step holds several epochs."""
    dataset = MadeUpDataset(size)
    found = plans(planner(dataset, pack=pack), 40)
    places = {p.index: p for plan in found for p in chain.from_iterable(plan.micro_batches)}
    (end,) = found[-1].end
    assert sorted(chain.from_iterable(indices(plan) for plan in found)) == list(range(end)) and end > size
    order = samples_at(1, "train", 0, end, size).tolist()
    assert [places[index].sample for index in range(end)] == order
    for plan in found:
        assert sorted(indices(plan)) == list(range(plan.start[0], plan.end[0]))
        assert len(plan.micro_batches) == len(plan.costs) == 16


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_packed_rows_hold_whole_samples(micro: int) -> None:
    """A place is as large as what is left of its sample at S, and the places of a row fit into it."""
    dataset = MadeUpDataset(500)
    for plan in plans(planner(dataset, micro), 20):
        for places in plan.micro_batches:
            assert places and places == sorted(places, key=lambda place: place.index)
            assert sum(place.length for place in places) <= micro * S
            assert sum(place.images for place in places) <= micro * MAX_IMAGES
            for place in places:
                stored = dataset[place.sample]
                sample = Assembler(PER_IMAGE, IMAGE, 0), stored.tokens, stored.learnt
                found, again = document(*sample, S, MAX_IMAGES), document(*sample, place.length, place.images)
                assert (len(found.input_ids), found.num_images) == (place.length, place.images)
                assert np.array_equal(again.input_ids, found.input_ids)
                assert np.array_equal(again.labels, found.labels)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("balance", [False, True])
def test_the_ranks_share_the_step_out(pack: bool, balance: bool) -> None:
    """Any number of ranks, any step to go on from: the same micro-batches, on each rank as many."""
    dataset = MadeUpDataset(300)
    of = planner(dataset, pack=pack, balance=balance)
    whole = plans(of, 12)
    for number, plan in enumerate(whole):
        assert plan == planner(dataset, pack=pack, balance=balance).plan(plan.start)
        assert plan.start == (whole[number - 1].end if number else (0,))
        for dp_size in (1, 2, 4, 8, 16):
            ranks = [plan.of_rank(rank, dp_size) for rank in range(dp_size)]
            assert {len(rank) for rank in ranks} == {16 // dp_size}
            dealt = [places[0].index for rank in ranks for places in rank]
            assert sorted(dealt) == sorted(places[0].index for places in plan.micro_batches)


def test_balance_changes_no_step_and_plain_order_is_as_it_was() -> None:
    dataset = MadeUpDataset(300)
    for pack in (False, True):
        even, plain = (plans(planner(dataset, pack=pack, balance=balance), 10) for balance in (True, False))
        assert [(plan.start, plan.end) for plan in even] == [(plan.start, plan.end) for plan in plain]
    # one sample per row, unbalanced or of equal cost: position j of the m-th micro-batch of rank r
    text_only = MadeUpDataset(300)
    text_only.images[:] = 0
    for plan in (plain_plan(dataset, balance=False), plain_plan(text_only, balance=True)):
        for rank in range(4):
            found = [[place.index for place in places] for places in plan.of_rank(rank, 4)]
            assert found == [[32 + (m * 4 + rank) * 2 + j for j in range(2)] for m in range(4)]


def plain_plan(dataset: MadeUpDataset, balance: bool) -> StepPlan:
    return planner(dataset, pack=False, balance=balance).plan((32,))


@pytest.mark.parametrize(("pack", "before", "after"), [(False, 1.45, 1.13), (True, 1.045, 1.032)])
def test_micro_batches_and_ranks_cost_about_the_same(pack: bool, before: float, after: float) -> None:
    """The dearest over the mean in 100 steps of 16 micro-batches of 128 positions, on 8 ranks."""
    dataset = MadeUpDataset(3000)
    ratios = {}
    for balance in (True, False):
        of = planner(dataset, pack=pack, balance=balance)
        each, ranks = [], []
        for plan in plans(of, 100):
            totals = [costs(of, places, pack) for places in plan.micro_batches]
            each.append(max(totals) / np.mean(totals))
            sums = [sum(costs(of, p, pack) for p in plan.of_rank(rank, 8)) for rank in range(8)]
            ranks.append(max(sums) / np.mean(sums))
        ratios[balance] = (np.mean(each), np.mean(ranks))
    assert ratios[False][0] > before and ratios[True][0] < after, ratios
    assert ratios[True][1] < min(ratios[False][1], 1.04), ratios


def costs(of: StepPlanner, places: list[Any], pack: bool) -> int:
    """Of a micro-batch, counted anew from its samples."""
    lengths, images = of.needs(np.array([place.sample for place in places]), S)
    cost = Cost(image=32.0, attention=0.01 if pack else 0.0)
    return 2 * S * UNIT + int(cost.of(lengths, images).sum())


def test_tokens_are_read_for_samples_that_are_cut_alone() -> None:
    dataset = MadeUpDataset(400)
    long = [len(t) + 4 * n > S or n > MAX_IMAGES for t, n in zip(dataset.tokens, dataset.images, strict=True)]
    planner(dataset).needs(np.arange(400), S)
    assert 0 < dataset.num_read == sum(long) < 100
    dataset.num_read = 0
    list(islice(plans(planner(dataset, pack=False, balance=False), 4), 4))
    assert dataset.num_read == 0
