"""The stream of micro-batches of one data-parallel rank, in training order, prepared in the background.

The story of a batch: `step_plan` says which samples -> `indexed` reads their tokens -> `assemble` makes
documents -> their images are read and decoded together -> a sample with a bad image is replaced -> batch.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.assemble import Assembler, Document
from megamm.data.balance import Cost
from megamm.data.images import ImageError, make_image_loader
from megamm.data.indexed import PreparedDataset
from megamm.data.order import hashed, substitute_at
from megamm.data.quarantine import Quarantine
from megamm.data.step_plan import Place, StepPlanner
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError, RunError

MIN_SAMPLES_TO_JUDGE = 100  # before this many samples the share of bad images stops no run
MAX_ATTEMPTS = 32  # replacements of one sample; so many bad ones in a row mean that the images are gone
MAX_DRAWS = 64  # substitutes that are looked at for one that need not be cut to fit a place in a packed row


@dataclass
class LoaderStats:
    """Counts since the loader was made, of this rank.

    Attributes:
        samples: delivered. replaced: of these, had an unreadable image and are substitutes.
        truncated: longer than the sequence length (or, as a substitute, than the place in a packed row).
        without_loss: no position carries loss.
        dropped_images: cut off by truncation.
        positions, padding: of all rows, and those of them that hold no sample.
    """

    samples: int = 0
    replaced: int = 0
    truncated: int = 0
    without_loss: int = 0
    dropped_images: int = 0
    positions: int = 0
    padding: int = 0


class BatchLoader:
    """Iterates over the micro-batches of data-parallel rank `dp_rank` without end.

    The samples of a step and the micro-batches they form are the same for every dp_size (see step_plan),
    and any `consumed_samples` at which a step ended continues exactly where a run with that count stopped.
    A sample with an unreadable image is replaced after planning, so the plan of a step never changes. In a
    packed row the substitute has the place of that sample: of the next MAX_DRAWS substitutes, the first
    that fits into it whole, or else the first, cut (none that has turned out bad already).

    Attributes:
        image_loader: the one in use; its `name` is worth a log line.
        stats: what happened so far (written by the preparing thread, a few batches ahead).
        consumed_samples: global samples of this stage that the steps delivered so far used, on all ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        consumed_samples: int,
        dp_rank: int,
        dp_size: int,
        quarantine: Path | None,
        cost: Cost = Cost(),  # noqa: B008 (frozen)
    ):
        """
        Args:
            consumed_samples: global samples of this stage that were trained on already.
            quarantine: file to which one JSON line is appended per bad image; None: not recorded.
            cost: what samples cost, for data.balance.

        Raises:
            InputError: the dataset is missing or damaged, was made with another tokenizer, or the
                global batch cannot be dealt out to dp_size ranks.
        """
        data = recipe.data
        if data.train is None:
            raise InputError("data.train: is not set; give a directory written by `megamm prepare`")
        self.recipe, self.dp_rank, self.dp_size = recipe, dp_rank, dp_size
        _check_batch_size(recipe, dp_size)
        self.dataset = PreparedDataset(data.train)
        _check_tokenizer(self.dataset, tokenizer, recipe)
        self._assembler = Assembler(recipe.model.tokens_per_image, tokenizer.image_id, tokenizer.pad_id)
        self._planner = StepPlanner(self.dataset, self._assembler, recipe, cost)
        self.image_loader = make_image_loader(data.image, recipe.model.vision.image_size, training=True)
        self._readers = ThreadPoolExecutor(max(1, data.image.num_workers))
        self.consumed_samples = consumed_samples
        self._quarantine = Quarantine(quarantine)
        self.stats = LoaderStats()
        # batches, each with the consumed samples after it
        self._ready: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(max(1, data.prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._prepare, name="batch-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; raises what its preparation raised."""
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self.consumed_samples = item
        return batch

    def close(self) -> None:
        """Stop the background thread and the decoders; may be called again."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)  # makes room, so that the thread sees the event
        self._readers.shutdown()
        self.image_loader.close()
        self.dataset.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self) -> None:
        try:
            consumed = self.consumed_samples
            while not self._stop.is_set():
                plan = self._planner.plan(consumed)
                micro_batches = plan.of_rank(self.dp_rank, self.dp_size)
                for number, places in enumerate(micro_batches, start=1):
                    if self._stop.is_set():
                        return
                    consumed = plan.end if number == len(micro_batches) else plan.start
                    self._ready.put((self._batch(places), consumed))
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)

    def _batch(self, places: Sequence[Place]) -> Batch:
        slots = [self._slot(place, place.sample, draw=0) for place in places]
        todo, replaced = slots, 0
        while todo:
            self._load_images(todo)
            todo = [slot for slot in todo if slot.bad]
            replaced += sum(slot.draw == 0 for slot in todo)
            for slot in todo:
                self._replace(slot)
        recipe, data = self.recipe, self.recipe.data
        batch = self._assembler.batch(
            [slot.document for slot in slots],
            data.sequence_length * (recipe.training.micro_batch_size if data.pack else 1),
            data.pack,
            [image for slot in slots for image in slot.images],
            recipe.model.vision.image_size,
            [slot.sample for slot in slots],
            replaced,
        )
        self._count(slots, batch)
        return batch

    def _slot(self, place: Place, sample: int, draw: int) -> _Slot:
        stored = self.dataset[sample]
        document = self._assembler.document(stored.tokens, stored.learnt, place.length, place.images)
        if document.num_images + document.num_dropped_images != len(stored.images):
            raise InputError(
                f"{self.dataset.directory}: sample {sample} has other images than placeholders; "
                "the dataset is damaged, run `megamm prepare` again"
            )
        return _Slot(place, sample, draw, document, stored.images[: document.num_images])

    def _load_images(self, slots: Sequence[_Slot]) -> None:
        """Read and decode the images of `slots`; a slot is `bad` if any of its images is."""
        jobs = [(slot, place) for slot in slots for place in range(len(slot.records))]
        read = list(self._readers.map(lambda job: self._read(job[0].records[job[1]]), jobs))
        decoded = iter(
            self.image_loader.load(
                [data for data in read if isinstance(data, bytes)],
                [
                    self._key(slot, place)
                    for (slot, place), data in zip(jobs, read, strict=True)
                    if isinstance(data, bytes)
                ],
            )
        )
        for slot in slots:
            slot.images, slot.bad = [], False
        for (slot, place), data in zip(jobs, read, strict=True):
            result = next(decoded) if isinstance(data, bytes) else data
            if isinstance(result, torch.Tensor):
                slot.images.append(result)
            else:
                slot.bad = True
                self._quarantine.add(
                    self.dataset, slot.records[place], slot.sample, slot.place.index, str(result)
                )

    def _key(self, slot: _Slot, number: int) -> int:
        """What decides the augmentation of an image: its place in the training order."""
        return hashed(self.recipe.seed, self.recipe.stage, "image", slot.place.index, slot.draw, number)

    def _read(self, image: int) -> bytes | ImageError:
        try:
            return self.dataset.read_image(image)
        except ImageError as error:
            return error

    def _replace(self, slot: _Slot) -> None:
        """Give the slot another sample, drawn from its place in the order alone."""
        if len(slot.tried) == MAX_ATTEMPTS:
            raise RunError(
                f"{self.dataset.directory}: {MAX_ATTEMPTS} samples in a row have unreadable images; "
                f"check the images, the last problems are in {self._quarantine.path}"
            )
        slot.tried.append(slot.sample)
        draw, sample = self._substitute(slot)
        other = self._slot(slot.place, sample, draw)
        slot.sample, slot.draw, slot.document, slot.records = sample, draw, other.document, other.records

    def _substitute(self, slot: _Slot) -> tuple[int, int]:
        """(number of the draw, sample) of the next substitute."""
        recipe, place, size = self.recipe, slot.place, len(self.dataset)
        draws = range(slot.draw + 1, slot.draw + 1 + MAX_DRAWS)
        samples = np.array(
            [substitute_at(recipe.seed, recipe.stage, place.index, draw, size) for draw in draws]
        )
        lengths, images = self._planner.needs(samples)
        fits = (lengths <= place.length) & (images <= place.images)
        untried = ~np.isin(samples, slot.tried)
        chosen = int(np.where(untried, 1 + fits, 0).argmax())  # of those that rank highest, the first
        return draws[chosen], int(samples[chosen])

    def _count(self, slots: Sequence[_Slot], batch: Batch) -> None:
        stats, documents = self.stats, [slot.document for slot in slots]
        stats.samples += len(slots)
        stats.replaced += batch.num_skipped
        stats.truncated += sum(document.truncated for document in documents)
        stats.without_loss += sum(not document.learnt for document in documents)
        stats.dropped_images += sum(document.num_dropped_images for document in documents)
        stats.positions += batch.input_ids.numel()
        stats.padding += batch.num_padding
        limit = self.recipe.data.max_bad_images
        if stats.samples >= MIN_SAMPLES_TO_JUDGE and stats.replaced > limit * stats.samples:
            raise RunError(
                f"{self.dataset.directory}: {stats.replaced} of {stats.samples} samples had unreadable "
                f"images, more than data.max_bad_images = {limit}; see {self._quarantine.path}, repair the "
                "images or raise the limit"
            )


@dataclass
class _Slot:
    """A place and the sample that fills it: its own or, at draw 1, 2, ..., a substitute. `tried` are those
    before, which were bad."""

    place: Place
    sample: int
    draw: int
    document: Document
    records: range
    images: list[torch.Tensor] = field(default_factory=list)
    bad: bool = False
    tried: list[int] = field(default_factory=list)


def _check_batch_size(recipe: Recipe, dp_size: int) -> None:
    training = recipe.training
    if training.global_batch_size % (training.micro_batch_size * dp_size):
        raise InputError(
            f"training.global_batch_size: {training.global_batch_size} is no multiple of micro_batch_size x "
            f"data-parallel size = {training.micro_batch_size} x {dp_size}; change one of them"
        )


def _check_tokenizer(dataset: PreparedDataset, tokenizer: Tokenizer, recipe: Recipe) -> None:
    if dataset.manifest.tokenizer_sha256 != tokenizer.sha256:
        raise InputError(
            f"{dataset.directory}: was prepared with another tokenizer than {recipe.tokenizer}; "
            "prepare it again with this one, or correct the key tokenizer"
        )
    vocab_size = recipe.model.language.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.language.vocab_size: is {vocab_size}, less than the {tokenizer.vocab_size} ids of "
            f"{recipe.tokenizer}; raise it to that number"
        )
