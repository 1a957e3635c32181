"""One micro-batch from the places that the plan gives it: a pure function of plan, dataset and recipe.

`indexed` reads the tokens of each sample -> `assemble` makes documents -> their images are read and decoded
together -> a sample with a bad image is replaced -> batch. Nothing here remembers what came before, so
any process may make any micro-batch: a thread of the training process (`MakeHere`), or others (workers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.assemble import Assembler, Documents
from megamm.data.balance import Cost
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.images import ImageError, make_image_loader
from megamm.data.order import hashed
from megamm.data.quarantine import KILLS, FileName, file_name
from megamm.data.step_plan import Place, StepPlanner
from megamm.errors import InputError, RunError

T = TypeVar("T")

MAX_ATTEMPTS = 32  # replacements of one sample; so many bad ones in a row mean that the images are gone
MAX_DRAWS = 64  # substitutes that are looked at for one that need not be cut to fit a place in a packed row


class BadImage(NamedTuple):
    """An image that could not be used: its record, whose it is, where in the order, and why."""

    image: int
    sample: int
    global_index: int
    reason: str


class Made(NamedTuple):
    """A micro-batch and what happened while it was made.

    Attributes:
        truncated, without_loss: documents that were cut, that have no position with loss.
        dropped_images: images that truncation took.
    """

    batch: Batch
    bad_images: list[BadImage]
    truncated: int
    without_loss: int
    dropped_images: int


class Ingredients(NamedTuple):
    """All that a process needs in order to make micro-batches.

    Attributes:
        image_id, pad_id: of the tokenizer.
        cost: what samples cost, for data.balance.
    """

    recipe: Recipe
    image_id: int
    pad_id: int
    cost: Cost

    def open_dataset(self) -> ConcatenatedDataset:
        """What data.train names.

        Raises:
            InputError: there is nothing, or one dataset is missing or damaged.
        """
        return ConcatenatedDataset.open(self.recipe.data)

    def planner(self, dataset: ConcatenatedDataset) -> StepPlanner:
        """The planner of the recipe's steps."""
        return StepPlanner(dataset, self._assembler(), self.recipe, self.cost)

    def maker(self, dataset: ConcatenatedDataset) -> BatchMaker:
        """The maker of their micro-batches."""
        return BatchMaker(dataset, self.planner(dataset), self._assembler(), self.recipe)

    def _assembler(self) -> Assembler:
        return Assembler(self.recipe.model.tokens_per_image, self.image_id, self.pad_id)


class MakeHere:
    """Makes micro-batches in the thread that asks for them."""

    def __init__(self, maker: BatchMaker, refused: Set[FileName]):
        self._maker, self._refused = maker, refused

    def run(self, jobs: Iterator[tuple[Sequence[Place], T]]) -> Iterator[tuple[Made, T]]:
        """The micro-batch of each of `jobs`, with the mark that came with its places."""
        for places, mark in jobs:
            yield self._maker.make(places, self._refused), mark

    def close(self) -> None:
        """Stop the maker."""
        self._maker.close()


class BatchMaker:
    """Makes micro-batches of a recipe over a dataset.

    A sample with an unreadable image is replaced after planning, so the plan of a step never changes. In a
    packed row the substitute has the place of that sample: of the next MAX_DRAWS substitutes, the first
    that fits into it whole, or else the first, cut (none that has turned out bad already).

    Attributes:
        image_loader: the one in use.
    """

    def __init__(
        self, dataset: ConcatenatedDataset, planner: StepPlanner, assembler: Assembler, recipe: Recipe
    ):
        self.dataset, self.recipe = dataset, recipe
        self._planner, self._assembler = planner, assembler
        self.image_loader = make_image_loader(
            recipe.data.image, recipe.model.vision.image_size, training=True
        )
        self._readers = ThreadPoolExecutor(max(1, recipe.data.image.num_workers))

    def make(
        self,
        places: Sequence[Place],
        refused: Set[FileName] = frozenset(),
        announce: Callable[[FileName], None] | None = None,
    ) -> Made:
        """The micro-batch of `places`.

        Args:
            refused: images that are known to kill the process that decodes them; they count as bad.
            announce: is told of every image before it is decoded, alone; nothing else changes.

        Raises:
            InputError: the dataset is damaged.
            RunError: too many samples in a row have unreadable images.
        """
        documents, records = self._documents(places, [place.sample for place in places])
        slots = [_Slot(place, place.sample, 0, found) for place, found in zip(places, records, strict=True)]
        todo, replaced = slots, 0
        bad_images: list[BadImage] = []
        while todo:
            bad_images += self._load_images(todo, refused, announce)
            todo = [slot for slot in todo if slot.bad]
            replaced += sum(slot.draw == 0 for slot in todo)
            for slot in todo:
                self._replace(slot, bad_images[-1])
        recipe, data = self.recipe, self.recipe.data
        if replaced:
            documents, _ = self._documents(places, [slot.sample for slot in slots])
        length = self._planner.groups[places[0].group].sequence_length
        batch = self._assembler.batch(
            documents,
            length * (recipe.training.micro_batch_size if data.pack else 1),
            data.pack,
            [image for slot in slots for image in slot.images],
            recipe.model.vision.image_size,
            [slot.sample for slot in slots],
            replaced,
        )
        sizes = documents.sizes
        return Made(
            batch,
            bad_images,
            truncated=int(sizes.truncated.sum()),
            without_loss=int((sizes.num_labels == 0).sum()),
            dropped_images=int((sizes.placeholders - sizes.images).sum()),
        )

    def close(self) -> None:
        """Stop readers and decoders."""
        self._readers.shutdown()
        self.image_loader.close()

    def _documents(self, places: Sequence[Place], samples: Sequence[int]) -> tuple[Documents, list[range]]:
        """(documents, image records of each) of samples, cut to fit their places."""
        stored = self.dataset.samples(np.array(samples, np.int64))
        documents = self._assembler.documents(
            stored.stretches, [place.length for place in places], [place.images for place in places]
        )
        other = np.flatnonzero(documents.sizes.placeholders != stored.num_images)
        if len(other):
            directory, row = self.dataset.origin(samples[other[0]])
            raise InputError(
                f"{directory}: sample {row} has other images than placeholders; "
                "the dataset is damaged, run `megamm prepare` again"
            )
        kept = documents.sizes.images.tolist()
        return documents, [stored.images(number)[:count] for number, count in enumerate(kept)]

    def _load_images(
        self, slots: Sequence[_Slot], refused: Set[FileName], announce: Callable[[FileName], None] | None
    ) -> list[BadImage]:
        """Read and decode the images of `slots`; a slot is `bad` if any of its images is. The bad ones."""
        bad_images = []
        jobs = [(slot, place) for slot in slots for place in range(len(slot.records))]
        read = list(self._readers.map(lambda job: self._read(job[0].records[job[1]], refused), jobs))
        decoded = self._decode(
            [(*job, data) for job, data in zip(jobs, read, strict=True) if isinstance(data, bytes)], announce
        )
        for slot in slots:
            slot.images, slot.bad = [], False
        for (slot, place), data in zip(jobs, read, strict=True):
            result = next(decoded) if isinstance(data, bytes) else data
            if isinstance(result, torch.Tensor):
                slot.images.append(result)
            else:
                slot.bad = True
                bad_images.append(BadImage(slot.records[place], slot.sample, slot.place.index, str(result)))
        return bad_images

    def _decode(
        self, encoded: Sequence[tuple[_Slot, int, bytes]], announce: Callable[[FileName], None] | None
    ) -> Iterator[torch.Tensor | ImageError]:
        """Of images by slot and place in it: all together or, if each is to be announced, one by one."""
        keys = [self._key(slot, place) for slot, place, _ in encoded]
        if announce is None:
            yield from self.image_loader.load([data for _, _, data in encoded], keys)
            return
        for (slot, place, data), key in zip(encoded, keys, strict=True):
            announce(file_name(self.dataset, slot.records[place]))
            yield from self.image_loader.load([data], [key])

    def _key(self, slot: _Slot, number: int) -> int:
        """What decides the augmentation of an image: its place in the training order."""
        group = self._planner.groups[slot.place.group]
        return hashed(self.recipe.seed, group.key, "image", slot.place.index, slot.draw, number)

    def _read(self, image: int, refused: Set[FileName]) -> bytes | ImageError:
        if refused and file_name(self.dataset, image) in refused:
            return ImageError(KILLS)
        try:
            return self.dataset.read_image(image)
        except ImageError as error:
            return error

    def _replace(self, slot: _Slot, last: BadImage) -> None:
        """Give the slot another sample, drawn from its place in the order alone."""
        if len(slot.tried) == MAX_ATTEMPTS:
            raise RunError(
                f"{self.dataset.directory}: {MAX_ATTEMPTS} samples in a row have unreadable images; "
                f"check the images, the last one: {self.dataset.location(last.image).name} {last.reason}"
            )
        slot.tried.append(slot.sample)
        slot.draw, slot.sample = self._substitute(slot)
        _, (slot.records,) = self._documents([slot.place], [slot.sample])

    def _substitute(self, slot: _Slot) -> tuple[int, int]:
        """(number of the draw, sample) of the next substitute."""
        place, group = slot.place, self._planner.groups[slot.place.group]
        draws = range(slot.draw + 1, slot.draw + 1 + MAX_DRAWS)
        samples = group.substitutes(place.index, draws)
        lengths, images = self._planner.needs(samples, group.sequence_length)
        fits = (lengths <= place.length) & (images <= place.images)
        untried = ~np.isin(samples, slot.tried)
        chosen = int(np.where(untried, 1 + fits, 0).argmax())  # of those that rank highest, the first
        return draws[chosen], int(samples[chosen])


@dataclass
class _Slot:
    """A place and the sample that fills it: its own or, at draw 1, 2, ..., a substitute. `tried` are those
    before, which were bad."""

    place: Place
    sample: int
    draw: int
    records: range
    images: list[torch.Tensor] = field(default_factory=list)
    bad: bool = False
    tried: list[int] = field(default_factory=list)
