"""The mean loss over held-out samples: always the same ones, in the same micro-batches, in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.data.tokenizer import Tokenizer
from megamm.engine.groups import Groups
from megamm.engine.manifest import Progress
from megamm.engine.pipeline import forward_backward
from megamm.engine.ranks import gather
from megamm.training.feed import BatchFeed


class HeldOut:
    """The first validation.batches micro-batches of validation.data, read anew each time, as training
    reads its own (feed.py), without random crops and flips.

    All of them are the one step of a stage of its own, so how they are dealt over data-parallel ranks changes
    neither the samples nor the rows. Where there are more ranks than divide them, the others compute copies
    without labels, which count nothing.

    Attributes:
        description: what it consists of.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, groups: Groups) -> None:
        """
        Raises:
            MegammError: the data cannot be read, here or on another rank; all of it is tried.
        """
        self._recipe, self._tokenizer, self._groups = held_out_recipe(recipe), tokenizer, groups
        self._num_readers = max(n for n in range(1, groups.dp_size + 1) if recipe.validation.batches % n == 0)
        self.description = self._describe(*self._read())

    def loss(self, models: list[Any]) -> float:
        """Mean cross entropy per token that carries loss (collective).

        Args:
            models: chunks, wrapped for data parallelism and in evaluation mode.
        """
        batches, _ = self._read()
        return forward_backward(models, batches, self._groups, forward_only=True)

    def _read(self) -> tuple[list[Batch], BatchFeed]:
        """This rank's micro-batches, and the feed they came from, closed."""
        groups = self._groups
        number = groups.dp_rank % self._num_readers
        reader = replace(groups, dp_rank=number, dp_size=self._num_readers)
        quarantine = Path(self._recipe.run_dir) / "quarantine.jsonl"
        feed = BatchFeed(self._recipe, self._tokenizer, reader, Progress(), quarantine)
        try:
            batches = feed.next_step()
        finally:
            feed.close()
        if groups.dp_rank != number:
            batches = [_without_labels(batch) for batch in batches]
        if (self._recipe.parallel.virtual_pipeline or 1) > 1:  # which takes whole rounds
            batches += [_without_labels(batches[-1])] * (-len(batches) % groups.pp_size)
        return batches, feed

    def _describe(self, batches: list[Batch], feed: BatchFeed) -> str:
        validation, size = self._recipe.validation, sum(part["samples"] for part in feed.sources)
        counts = self._groups.is_model_leader and self._groups.dp_rank < self._num_readers
        skipped = sum(gather(sum(batch.num_skipped for batch in batches) if counts else 0))
        return (
            f"validation every {validation.interval} steps: loss over {feed.consumed_samples:,} samples of "
            f"{validation.data}"
            + (f", which has {size:,}, so some count twice" * (feed.consumed_samples > size))
            + (f"; {skipped} of them stand in for samples with unreadable pictures" * (skipped > 0))
        )


def held_out_recipe(recipe: Recipe) -> Recipe:
    """A stage whose one step consists of the held-out micro-batches.

    Its seed is fixed, so that the runs of a series look at the same samples.
    """
    data, validation = recipe.data, recipe.validation
    image = replace(
        data.image,
        loader="pillow",
        random_crop_scale=1.0,
        random_flip=False,
        scaled_decode=bool(data.image.scaled_decode),
        decode_device="cpu",
    )
    return replace(
        recipe,
        seed=1,
        stage="validation",
        data=replace(
            data,
            train=validation.data,
            sequence_length=max(data.sequence_lengths()),
            pure_batches=False,
            workers=0,
            image=image,
        ),
        training=replace(
            recipe.training, global_batch_size=validation.batches * recipe.training.micro_batch_size
        ),
    )


def _without_labels(batch: Batch) -> Batch:
    return replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), num_labels=0, num_skipped=0)
