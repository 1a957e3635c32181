"""The stream of micro-batches of one data-parallel rank, in training order, prepared in the background.

The story of a batch: `step_plan` says which samples -> `batch_maker` reads, decodes and assembles them, and
replaces those with bad images, in this process or in others (`workers`) -> here they are counted, recorded
and handed out in order.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.balance import Cost
from megamm.data.batch_maker import Ingredients, Made, MakeHere
from megamm.data.blend import Position
from megamm.data.concatenated import ConcatenatedDataset
from megamm.data.images import ImageLoader, make_image_loader
from megamm.data.quarantine import Quarantine
from megamm.data.resume_blend import resumed_position
from megamm.data.step_plan import Place
from megamm.data.tokenizer import Tokenizer
from megamm.data.workers import Workers
from megamm.errors import InputError, RunError

MIN_SAMPLES_TO_JUDGE = 100  # before this many samples the share of bad images stops no run


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
    and any position at which a step ended continues exactly where a run with that position stopped.

    Attributes:
        image_loader: the one in use; its `name` is worth a log line.
        stats: what happened so far (written by the preparing thread, a few batches ahead).
        planner: of the steps, with the groups of samples.
        remarks: what the user should know about `position`.
        position: of each group, the samples that the steps delivered so far used, on all ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        position: int | Sequence[int],
        dp_rank: int,
        dp_size: int,
        quarantine: Path | None,
        cost: Cost = Cost(),  # noqa: B008 (frozen)
        trained_on: Sequence[dict[str, Any]] = (),
    ):
        """
        Args:
            position: samples of this stage that were trained on already, of each group (of the only one, if
                it is a number); 0 or nothing at the start.
            quarantine: file to which one JSON line is appended per bad image; None: not recorded.
            cost: what samples cost, for data.balance.
            trained_on: `Blend.contents` of the run that came to `position`, to be compared.

        Raises:
            InputError: a dataset is missing or damaged, was made with another tokenizer, the position is
                one in other groups, or the global batch cannot be dealt out to dp_size ranks.
        """
        self.recipe, self.dp_rank, self.dp_size = recipe, dp_rank, dp_size
        _check_batch_size(recipe, dp_size)
        ingredients = Ingredients(recipe, tokenizer.image_id, tokenizer.pad_id, cost)
        self.dataset = ingredients.open_dataset()
        _check_tokenizer(self.dataset, tokenizer, recipe)
        self.planner = ingredients.planner(self.dataset)
        self.position, self.remarks = resumed_position(self.planner.blend, position, trained_on)
        self._quarantine = Quarantine(quarantine)
        self.stats = LoaderStats()
        self._stop = threading.Event()
        self._makers, self.image_loader = self._make_makers(ingredients)
        # batches, each with the position after it
        self._ready: queue.Queue[tuple[Batch, Position] | BaseException] = queue.Queue(
            max(1, recipe.data.prefetch)
        )
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
        batch, self.position = item
        return batch

    @property
    def consumed_samples(self) -> int:
        """Samples of this stage that the steps delivered so far used, on all ranks."""
        return sum(self.position)

    def close(self) -> None:
        """Stop the background thread and the decoders; may be called again."""
        self._stop.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)  # makes room, so that the thread sees the event
        self._makers.close()
        self.dataset.close()

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_makers(self, ingredients: Ingredients) -> tuple[MakeHere | Workers, ImageLoader]:
        """What makes micro-batches, and the image loader it uses (or one like those of its processes)."""
        recipe, refused = self.recipe, self._quarantine.killers()
        if not recipe.data.workers:
            maker = ingredients.maker(self.dataset)
            return MakeHere(maker, refused), maker.image_loader
        image_loader = make_image_loader(recipe.data.image, recipe.model.vision.image_size, training=True)
        image_loader.close()
        # Shorter than what the other ranks wait for this one, so that they are told.
        timeout_s = recipe.parallel.timeout_s / 2
        return Workers(ingredients, recipe.data.workers, timeout_s, refused, self._stop), image_loader

    def _prepare(self) -> None:
        try:
            for made, position in self._makers.run(self._plan()):
                self._count(made)
                self._ready.put((made.batch, position))
                if self._stop.is_set():
                    return
        except BaseException as error:  # the consumer raises it
            self._ready.put(error)

    def _plan(self) -> Iterator[tuple[list[Place], Position]]:
        """The micro-batches of this rank, and the position after each, until the loader is closed."""
        position = self.position
        while not self._stop.is_set():
            plan = self.planner.plan(position)
            *others, last = plan.of_rank(self.dp_rank, self.dp_size)
            for places in others:
                if self._stop.is_set():
                    return
                yield places, plan.start
            position = plan.end
            yield last, position

    def _count(self, made: Made) -> None:
        stats, batch = self.stats, made.batch
        for bad in made.bad_images:
            self._quarantine.add(self.dataset, *bad)
        stats.samples += len(batch.sample_ids)
        stats.replaced += batch.num_skipped
        stats.truncated += made.truncated
        stats.without_loss += made.without_loss
        stats.dropped_images += made.dropped_images
        stats.positions += batch.input_ids.numel()
        stats.padding += batch.num_padding
        limit = self.recipe.data.max_bad_images
        if stats.samples >= MIN_SAMPLES_TO_JUDGE and stats.replaced > limit * stats.samples:
            raise RunError(
                f"{self.dataset.directory}: {stats.replaced} of {stats.samples} samples had unreadable "
                f"images, more than data.max_bad_images = {limit}; see {self._quarantine.path}, repair the "
                "images or raise the limit"
            )


def _check_batch_size(recipe: Recipe, dp_size: int) -> None:
    training = recipe.training
    if training.global_batch_size % (training.micro_batch_size * dp_size):
        raise InputError(
            f"training.global_batch_size: {training.global_batch_size} is no multiple of micro_batch_size x "
            f"data-parallel size = {training.micro_batch_size} x {dp_size}; change one of them"
        )


def _check_tokenizer(dataset: ConcatenatedDataset, tokenizer: Tokenizer, recipe: Recipe) -> None:
    for part in dataset.parts:
        if part.manifest.tokenizer_sha256 != tokenizer.sha256:
            raise InputError(
                f"{part.directory}: was prepared with another tokenizer than {recipe.tokenizer}; "
                "prepare it again with this one, or correct the key tokenizer"
            )
    vocab_size = recipe.model.language.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"model.language.vocab_size: is {vocab_size}, less than the {tokenizer.vocab_size} ids of "
            f"{recipe.tokenizer}; raise it to that number"
        )
