"""The stream of micro-batches of one data-parallel rank, in training order, prepared in the background.

The story of a batch: `order` says which samples -> `indexed` reads their tokens -> `assemble` makes rows
-> the images of the rows are read and decoded together -> a sample with a bad image is replaced -> collate.
"""

from __future__ import annotations

import contextlib
import json
import os
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
from megamm.data.assemble import Assembler, Row, collate
from megamm.data.images import ImageError, make_image_loader
from megamm.data.indexed import PreparedDataset
from megamm.data.order import hashed, samples_at, substitute_at
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError, RunError

ORDER_BLOCK = 4096  # global samples whose rows are computed at once
MIN_SAMPLES_TO_JUDGE = 100  # before this many samples the share of bad images stops no run
MAX_ATTEMPTS = 32  # replacements of one sample; so many bad ones in a row mean that the images are gone


@dataclass
class LoaderStats:
    """Counts since the loader was made, of this rank.

    Attributes:
        samples: delivered. replaced: of these, had an unreadable image and are substitutes.
        truncated: longer than the sequence length. without_loss: no position carries loss.
        dropped_images: cut off by truncation.
    """

    samples: int = 0
    replaced: int = 0
    truncated: int = 0
    without_loss: int = 0
    dropped_images: int = 0


class BatchLoader:
    """Iterates over the micro-batches of data-parallel rank `dp_rank` without end.

    With micro-batch size b and D = dp_size, position j of the m-th micro-batch from the start of a step
    is global sample (m * D + dp_rank) * b + j of that step: the samples of a step are the same for every
    D, and any `consumed_samples` continues exactly where a run with that count stopped.

    Attributes:
        image_loader: the one in use; its `name` is worth a log line.
        stats: what happened so far (written by the preparing thread, a few batches ahead).
        micro_batches_per_step: micro-batches that make one optimizer step on this rank.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        consumed_samples: int,
        dp_rank: int,
        dp_size: int,
        quarantine: Path | None,
    ):
        """
        Args:
            consumed_samples: global samples of this stage that were trained on already.
            quarantine: file to which one JSON line is appended per bad image; None: not recorded.

        Raises:
            InputError: the dataset is missing or damaged, was made with another tokenizer, or the
                global batch cannot be dealt out to dp_size ranks.
        """
        data = recipe.data
        if data.train is None:
            raise InputError("data.train: is not set; give a directory written by `megamm prepare`")
        self.recipe, self.dp_rank, self.dp_size = recipe, dp_rank, dp_size
        self.micro_batches_per_step = _micro_batches(recipe, dp_size)
        self.dataset = PreparedDataset(data.train)
        _check_tokenizer(self.dataset, tokenizer, recipe)
        self._assembler = Assembler(
            data.sequence_length,
            recipe.model.tokens_per_image,
            tokenizer.image_id,
            tokenizer.pad_id,
            data.max_images,
        )
        self.image_loader = make_image_loader(data.image, recipe.model.vision.image_size, training=True)
        self._readers = ThreadPoolExecutor(max(1, data.image.num_workers))
        self._consumed = consumed_samples
        self._quarantine = _Quarantine(quarantine)
        self.stats = LoaderStats()
        self._order = np.empty(0, np.int64)
        self._order_start = 0
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(max(1, data.prefetch))
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
        return item

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
            number = 0
            while not self._stop.is_set():
                self._ready.put(self._batch(number))
                number += 1
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)

    def _batch(self, number: int) -> Batch:
        """The number-th micro-batch of this rank since the loader was made."""
        size = self.recipe.training.micro_batch_size
        step, micro = divmod(number, self.micro_batches_per_step)
        first = (
            self._consumed
            + step * self.recipe.training.global_batch_size
            + (micro * self.dp_size + self.dp_rank) * size
        )
        slots = [self._slot(index, self._row_of(index), attempt=0) for index in range(first, first + size)]
        todo, replaced = slots, 0
        while todo:
            self._load_images(todo)
            todo = [slot for slot in todo if slot.bad]
            replaced += sum(slot.attempt == 0 for slot in todo)
            for slot in todo:
                self._replace(slot)
        self._count(slots, replaced)
        return collate(
            [slot.row for slot in slots],
            [image for slot in slots for image in slot.images],
            self.recipe.model.vision.image_size,
            [slot.sample for slot in slots],
            replaced,
        )

    def _slot(self, index: int, sample: int, attempt: int) -> _Slot:
        stored = self.dataset[sample]
        row = self._assembler.row(stored.tokens, stored.learnt)
        if row.num_images + row.num_dropped_images != len(stored.images):
            raise InputError(
                f"{self.dataset.directory}: sample {sample} has other images than placeholders; "
                "the dataset is damaged, run `megamm prepare` again"
            )
        return _Slot(index, sample, attempt, row, stored.images[: row.num_images])

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
                self._quarantine.add(self.dataset, slot.records[place], slot, str(result))

    def _key(self, slot: _Slot, place: int) -> int:
        """What decides the augmentation of an image: its place in the training order."""
        return hashed(self.recipe.seed, self.recipe.stage, "image", slot.index, slot.attempt, place)

    def _read(self, image: int) -> bytes | ImageError:
        try:
            return self.dataset.read_image(image)
        except ImageError as error:
            return error

    def _replace(self, slot: _Slot) -> None:
        """Give the slot another sample, drawn from its place in the order alone."""
        recipe, attempt = self.recipe, slot.attempt + 1
        if attempt > MAX_ATTEMPTS:
            raise RunError(
                f"{self.dataset.directory}: {MAX_ATTEMPTS} samples in a row have unreadable images; "
                f"check the images, the last problems are in {self._quarantine.path}"
            )
        sample = substitute_at(recipe.seed, recipe.stage, slot.index, attempt, len(self.dataset))
        other = self._slot(slot.index, sample, attempt)
        slot.sample, slot.attempt, slot.row, slot.records = other.sample, attempt, other.row, other.records

    def _count(self, slots: Sequence[_Slot], replaced: int) -> None:
        stats = self.stats
        stats.samples += len(slots)
        stats.replaced += replaced
        stats.truncated += sum(slot.row.truncated for slot in slots)
        stats.without_loss += sum(not slot.row.learnt for slot in slots)
        stats.dropped_images += sum(slot.row.num_dropped_images for slot in slots)
        limit = self.recipe.data.max_bad_images
        if stats.samples >= MIN_SAMPLES_TO_JUDGE and stats.replaced > limit * stats.samples:
            raise RunError(
                f"{self.dataset.directory}: {stats.replaced} of {stats.samples} samples had unreadable "
                f"images, more than data.max_bad_images = {limit}; see {self._quarantine.path}, repair the "
                "images or raise the limit"
            )

    def _row_of(self, index: int) -> int:
        """Dataset row of global sample `index`, from a block computed at once."""
        start = index - index % ORDER_BLOCK
        if start != self._order_start or not len(self._order):
            recipe = self.recipe
            self._order = samples_at(recipe.seed, recipe.stage, start, ORDER_BLOCK, len(self.dataset))
            self._order_start = start
        return int(self._order[index - start])


@dataclass
class _Slot:
    """One place of a micro-batch: its global index, and the sample that fills it."""

    index: int
    sample: int
    attempt: int
    row: Row
    records: range
    images: list[torch.Tensor] = field(default_factory=list)
    bad: bool = False


class _Quarantine:
    """Appends one line per bad image and sample; lines of several processes do not mix."""

    def __init__(self, path: Path | None):
        self.path = path
        self._seen: set[int] = set()

    def add(self, dataset: PreparedDataset, image: int, slot: _Slot, reason: str) -> None:
        if self.path is None or image in self._seen:
            return
        self._seen.add(image)
        location = dataset.location(image)
        line = {
            "source": dataset.store.source(location),
            "key": location.name,
            "reason": reason,
            "sample": slot.sample,
            "global_index": slot.index,
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                os.write(descriptor, (json.dumps(line) + "\n").encode())
            finally:
                os.close(descriptor)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written ({error.strerror}); free the disk") from None


def _micro_batches(recipe: Recipe, dp_size: int) -> int:
    training = recipe.training
    per_pass = training.micro_batch_size * dp_size
    if training.global_batch_size % per_pass:
        raise InputError(
            f"training.global_batch_size: {training.global_batch_size} is no multiple of micro_batch_size x "
            f"data-parallel size = {training.micro_batch_size} x {dp_size}; change one of them"
        )
    return training.global_batch_size // per_pass


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
