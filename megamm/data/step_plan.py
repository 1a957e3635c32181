"""What each optimizer step trains on, decided from the index alone, before a token or an image is read.

A plan is a pure function of (seed, stage, sources, samples consumed of each group before the step, global and
micro-batch size): it names the micro-batches of the whole run, and each data-parallel rank takes its own of
them. So the step is the same for every data-parallel size, and a run goes on anywhere if it knows how many
samples it has consumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megamm.config import Recipe
from megamm.data.assemble import Assembler
from megamm.data.balance import Cost, deal, even_out
from megamm.data.blend import Blend, Group, Position
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.packing import pack_prefix


@dataclass(frozen=True)
class Place:
    """Where one sample goes.

    Attributes:
        index: in the order of its group.
        sample: its row of the dataset.
        length, images: positions and images there is room for. In a packed row they are those of the
            sample itself, so a substitute for it has to do with them.
        group: whose samples the step takes.
    """

    index: int
    sample: int
    length: int
    images: int
    group: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One step.

    Attributes:
        start, end: the position before and after it. They differ in one group, of which the step uses the
            samples start[group] ... end[group] - 1, each once.
        group: its number.
        micro_batches: the places of each micro-batch of the step, over all data-parallel ranks.
        costs: of the micro-batches, beside the positions that each of them computes; 0 if not balanced.
    """

    start: Position
    end: Position
    group: int
    micro_batches: list[list[Place]]
    costs: list[int]

    def of_rank(self, dp_rank: int, dp_size: int) -> list[list[Place]]:
        """The micro-batches of one data-parallel rank. The dear ones are dealt over the ranks evenly; where
        all cost the same, they are dealt in turn."""
        return [self.micro_batches[number] for number in deal(self.costs, dp_size)[dp_rank]]


class StepPlanner:
    """Plans the steps of a recipe over a dataset.

    Attributes:
        groups: of samples that may share a step.
        blend: what they are made of.
    """

    def __init__(
        self, dataset: ConcatenatedDataset, assembler: Assembler, recipe: Recipe, cost: Cost
    ) -> None:
        self._dataset, self._assembler, self._recipe, self._cost = dataset, assembler, recipe, cost
        self._num_micro_batches = recipe.training.global_batch_size // recipe.training.micro_batch_size
        self.blend = Blend(dataset, recipe)
        self.groups = self.blend.groups

    def plan(self, position: Position) -> StepPlan:
        """The step that begins at `position`."""
        return self.plan_of(self.blend.next_group(position), position)

    def plan_of(self, number: int, position: Position) -> StepPlan:
        """The step that group `number` would have at `position`."""
        make = self._packed if self._recipe.data.pack else self._padded
        places, rows, costs = make(self.groups[number], position[number])
        end = list(position)
        end[number] += sum(map(len, rows))
        micro_batches = [[Place(*places[i], group=number) for i in row] for row in rows]
        return StepPlan(position, tuple(end), number, micro_batches, costs)

    def needs(self, samples: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """([n] positions, [n] images) that `samples` [n] take in a row, when they are cut to `length` and
        data.max_images. Tokens are read for those alone that have to be cut."""
        data = self._recipe.data
        tokens, images = self._dataset.sizes(samples)
        lengths = tokens + (self._assembler.tokens_per_image - 1) * images
        for i in np.flatnonzero((lengths > length) | (images > data.max_images)):
            stored = self._dataset[samples[i]].tokens
            lengths[i], images[i] = self._assembler.kept(stored, length, data.max_images)
        return lengths, images

    def _padded(self, group: Group, start: int) -> _Rows:
        """One sample per row."""
        data, num_micro = self._recipe.data, self._num_micro_batches
        samples = group.samples(start, self._recipe.training.global_batch_size)
        rows, costs = np.arange(len(samples)).reshape(num_micro, -1).tolist(), [0] * num_micro
        if data.balance:
            _, images = self.needs(samples, group.sequence_length)
            each = self._cost.of(np.zeros_like(images), images)  # every row computes all of its positions
            if each.min() < each.max():
                rows = sorted(deal(each.tolist(), num_micro))
            costs = [int(each[row].sum()) for row in rows]
        places = [
            (start + i, sample, group.sequence_length, data.max_images)
            for i, sample in enumerate(samples.tolist())
        ]
        return places, rows, costs

    def _packed(self, group: Group, start: int) -> _Rows:
        """As many samples as this finds room for in the rows of the step."""
        data, num_rows = self._recipe.data, self._num_micro_batches
        capacity = self._recipe.training.micro_batch_size * group.sequence_length
        max_images = self._recipe.training.micro_batch_size * data.max_images
        samples, lengths, images = self._enough(group, start, num_rows * capacity, num_rows * max_images)
        rows = pack_prefix(lengths, images, num_rows, capacity, max_images)
        each = self._cost.of(lengths, images) if data.balance else np.zeros_like(lengths)
        if data.balance:
            rows = even_out(rows, each, lengths, images, capacity, max_images)
        places = [
            (start + i, *place)
            for i, place in enumerate(zip(samples.tolist(), lengths.tolist(), images.tolist(), strict=True))
        ]
        return places, rows, [int(each[row].sum()) for row in rows]

    def _enough(
        self, group: Group, start: int, positions: int, images: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples from `start` on that take more than `positions` or more than `images` together, and what
        each takes."""
        length = group.sequence_length
        samples = group.samples(start, self._recipe.training.global_batch_size)
        needs = np.stack(self.needs(samples, length))
        while not (needs.sum(axis=1) > [positions, images]).any():
            more = group.samples(start + len(samples), len(samples))
            samples = np.concatenate([samples, more])
            needs = np.concatenate([needs, self.needs(more, length)], axis=1)
        return samples, needs[0], needs[1]


# (index, sample, positions, images) of the samples; those of each micro-batch; what these cost
_Rows = tuple[list[tuple[int, int, int, int]], list[list[int]], list[int]]
