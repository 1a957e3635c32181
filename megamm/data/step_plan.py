"""What each optimizer step trains on, decided from the index alone, before a token or an image is read.

A plan is a pure function of (seed, stage, samples consumed before the step, global and micro-batch size,
S): it names the micro-batches of the whole run, and each data-parallel rank takes its own of them. So the
step is the same for every data-parallel size, and a run goes on anywhere if it knows how many samples it
has consumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamm.config import Recipe
from megamm.data.assemble import Assembler
from megamm.data.balance import Cost, deal, even_out
from megamm.data.indexed import PreparedDataset
from megamm.data.order import samples_at
from megamm.data.packing import pack_prefix


@dataclass(frozen=True)
class Place:
    """Where one sample goes.

    Attributes:
        index: global, in the order of the stage.
        sample: its row of the dataset.
        length, images: positions and images there is room for. In a packed row they are those of the
            sample itself, so a substitute for it has to do with them.
    """

    index: int
    sample: int
    length: int
    images: int


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        start, end: the step uses the global samples start ... end - 1, each once.
        micro_batches: the places of each micro-batch of the step, over all data-parallel ranks.
        costs: of the micro-batches, beside the positions that each of them computes; 0 if not balanced.
    """

    start: int
    end: int
    micro_batches: list[list[Place]]
    costs: list[int]

    def of_rank(self, dp_rank: int, dp_size: int) -> list[list[Place]]:
        """The micro-batches of one data-parallel rank. The dear ones are dealt over the ranks evenly; where
        all cost the same, they are dealt in turn."""
        return [self.micro_batches[number] for number in deal(self.costs, dp_size)[dp_rank]]


class StepPlanner:
    """Plans the steps of a recipe over a dataset."""

    def __init__(self, dataset: PreparedDataset, assembler: Assembler, recipe: Recipe, cost: Cost) -> None:
        self._dataset, self._assembler, self._recipe, self._cost = dataset, assembler, recipe, cost
        self._num_micro_batches = recipe.training.global_batch_size // recipe.training.micro_batch_size

    def plan(self, consumed: int) -> StepPlan:
        """The step that begins at global sample `consumed`."""
        return self._packed(consumed) if self._recipe.data.pack else self._padded(consumed)

    def needs(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] positions, [n] images) that `samples` [n] take in a row, when they are cut to S and
        data.max_images. Tokens are read for those alone that have to be cut."""
        data = self._recipe.data
        tokens, images = self._dataset.sizes(samples)
        lengths = tokens + (self._assembler.tokens_per_image - 1) * images
        for i in np.flatnonzero((lengths > data.sequence_length) | (images > data.max_images)):
            stored = self._dataset[samples[i]].tokens
            lengths[i], images[i] = self._assembler.kept(stored, data.sequence_length, data.max_images)
        return lengths, images

    def _padded(self, start: int) -> StepPlan:
        """One sample per row."""
        recipe, data, num_micro = self._recipe, self._recipe.data, self._num_micro_batches
        samples = self._samples(start, recipe.training.global_batch_size)
        items, costs = np.arange(len(samples)).reshape(num_micro, -1).tolist(), [0] * num_micro
        if data.balance:
            _, images = self.needs(samples)
            each = self._cost.of(np.zeros_like(images), images)  # every row computes all of its positions
            if each.min() < each.max():
                items = sorted(deal(each.tolist(), num_micro))
            costs = [int(each[item].sum()) for item in items]
        places = [
            Place(start + i, sample, data.sequence_length, data.max_images)
            for i, sample in enumerate(samples.tolist())
        ]
        micro_batches = [[places[i] for i in item] for item in items]
        return StepPlan(start, start + len(samples), micro_batches, costs)

    def _packed(self, start: int) -> StepPlan:
        """As many samples as this finds room for in the rows of the step."""
        data, num_rows = self._recipe.data, self._num_micro_batches
        capacity = self._recipe.training.micro_batch_size * data.sequence_length
        max_images = self._recipe.training.micro_batch_size * data.max_images
        samples, lengths, images = self._enough(start, num_rows * capacity, num_rows * max_images)
        rows = pack_prefix(lengths, images, num_rows, capacity, max_images)
        each = self._cost.of(lengths, images) if data.balance else np.zeros_like(lengths)
        if data.balance:
            rows = even_out(rows, each, lengths, images, capacity, max_images)
        places = [
            Place(start + i, *place)
            for i, place in enumerate(zip(samples.tolist(), lengths.tolist(), images.tolist(), strict=True))
        ]
        micro_batches = [[places[i] for i in row] for row in rows]
        costs = [int(each[row].sum()) for row in rows]
        return StepPlan(start, start + sum(map(len, rows)), micro_batches, costs)

    def _enough(self, start: int, positions: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples from `start` on that take more than `positions` or more than `images` together, and what
        each takes."""
        block = self._recipe.training.global_batch_size
        samples = self._samples(start, block)
        needs = np.stack(self.needs(samples))
        while not (needs.sum(axis=1) > [positions, images]).any():
            more = self._samples(start + len(samples), len(samples))
            samples = np.concatenate([samples, more])
            needs = np.concatenate([needs, self.needs(more)], axis=1)
        return samples, needs[0], needs[1]

    def _samples(self, start: int, count: int) -> np.ndarray:
        recipe = self._recipe
        return samples_at(recipe.seed, recipe.stage, start, count, len(self._dataset))
