"""From the loader to every rank: one process per copy of the model reads, the others are told.

The reader ("model leader") is tensor rank 0 of the first pipeline stage. Tokens go to all ranks of its
copy of the model, images only to the first stage, which encodes them. A failure of one reader reaches
every rank of the run before anyone waits in a collective for it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.balance import Cost
from megamm.data.blend import Position
from megamm.data.describe_blend import describe_blend
from megamm.data.loader import BatchLoader
from megamm.data.tokenizer import Tokenizer
from megamm.engine.groups import Groups
from megamm.engine.manifest import Progress
from megamm.errors import InputError, MegammError
from megamm.planning.flops import causal_pairs, flops_per_step

NUMBERS = ("num_skipped", "num_padding", "num_labels", "num_pairs")  # of a Batch, told to all ranks


class BatchFeed:
    """The micro-batches of each step, on this rank's device.

    Attributes:
        position: of each group of sources, the samples that the steps so far used; the same on every rank.
            With data.pack, steps differ in how many they use.
        sources: what the groups consist of (`Blend.contents`).
        sequence_length: S of the last step's rows.
        group: number of the group of sources that the last step was taken from.
        sample_ids: of each micro-batch of the last step, on ranks that read; none elsewhere.
        description: lines for the log, on rank 0: what is trained on, and what the user should know of where
            the run stands.
        seconds_waited: for data, during the last step.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, groups: Groups, progress: Progress, quarantine: Path
    ) -> None:
        """
        Args:
            progress: where the run stands.
            quarantine: file for images that cannot be read.

        Raises:
            MegammError: a reader cannot start, here or on another rank, or the run was trained on other data.
        """
        self.recipe, self.groups = recipe, groups
        self.seconds_waited, self.sequence_length = 0.0, recipe.data.sequence_length
        self.group, self.sample_ids = 0, list[list[int]]()
        self.num_micro_batches = recipe.training.global_batch_size // (
            recipe.training.micro_batch_size * groups.dp_size
        )
        self._loader: BatchLoader | None = None
        self.description: list[str] = []
        error: BaseException | None = None
        if groups.is_model_leader:
            try:
                self._loader = BatchLoader(
                    recipe,
                    tokenizer,
                    progress.data_position or progress.consumed_samples,
                    groups.dp_rank,
                    groups.dp_size,
                    quarantine,
                    sample_cost(recipe),
                    progress.data_sources,
                )
                if dist.get_rank() == 0:
                    planner = self._loader.planner
                    self.description = describe_blend(planner, recipe.training.steps) + self._loader.remarks
            except Exception as caught:
                error = caught
        try:
            self.position, self.sources = self._meet(error)
        except BaseException:
            self.close()
            raise

    @property
    def image_loader(self) -> str:
        """Name of the image loader in use ("" on ranks that do not read)."""
        return self._loader.image_loader.name if self._loader else ""

    @property
    def consumed_samples(self) -> int:
        """Samples of the stage that the steps so far used, of all groups."""
        return sum(self.position)

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, the same on all ranks of one copy of the model.

        Raises:
            MegammError: reading failed, here or on another rank.
        """
        started, step_start = time.perf_counter(), self.consumed_samples
        batches: list[Batch | None] = [None] * self.num_micro_batches
        error: BaseException | None = None
        if self._loader is not None:
            try:
                batches = [next(self._loader) for _ in batches]
            except Exception as caught:
                error = caught
        before, self.position = self.position, self._agree(error)
        moved = [
            number for number, pair in enumerate(zip(before, self.position, strict=True)) if len({*pair}) > 1
        ]
        self.group = moved[0] if moved else 0
        self.sample_ids = [batch.sample_ids.tolist() for batch in batches if batch is not None]
        self.seconds_waited = time.perf_counter() - started
        if self.groups.tp_size * self.groups.pp_size == 1:
            mine = [batch.to(self.groups.device) for batch in batches if batch is not None]
        else:
            counts = self._share_counts(batches)
            mine = [self._share(batch, *count) for batch, count in zip(batches, counts, strict=True)]
        data, size = self.recipe.data, self.recipe.training.micro_batch_size
        self.sequence_length = mine[0].input_ids.shape[1] // (size if data.pack else 1)
        return [replace(batch, step_start=step_start) for batch in mine]

    def remarks(self) -> list[str]:
        """What the user should know about the samples read so far, by this rank."""
        if self._loader is None:
            return []
        stats = self._loader.stats
        lengths = " or ".join(str(length) for length in self.recipe.data.sequence_lengths())
        counts = {
            f"cut, being longer than data.sequence_length {lengths} or data.max_images": stats.truncated,
            "without any token that carries loss": stats.without_loss,
        }
        remarks = [f"{n:,} of {stats.samples:,} samples read were {what}" for what, n in counts.items() if n]
        if self.recipe.data.pack and stats.positions:
            remarks.append(
                f"{stats.padding / stats.positions:.1%} of the positions of packed rows were padding"
            )
        return remarks

    def close(self) -> None:
        """Stop reading."""
        if self._loader is not None:
            self._loader.close()

    def _meet(self, error: BaseException | None) -> tuple[Position, list[dict[str, Any]]]:
        """The position and the sources, which all readers must have in common. If any rank has an error,
        every rank raises: the own one, or what another rank reported."""
        mine = None
        if self._loader is not None:
            mine = (self._loader.position, self._loader.planner.blend.contents())
        found = _gathered(error, mine)
        read = [part for part in found if part is not None]
        if any(part != read[0] for part in read):
            names = ", ".join(source.path for source in self.recipe.data.sources())
            raise InputError(f"{names}: not the same on every machine; give all of them the same datasets")
        return read[0][0], read[0][1]

    def _agree(self, error: BaseException | None) -> Position:
        """The position after the step, told to the ranks that do not read; errors as in `_meet`."""
        position = self._loader.position if self._loader is not None else (0,) * len(self.position)
        message = torch.tensor([int(error is not None), *position], device=self.groups.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(message, dist.ReduceOp.MAX)
        failed, *numbers = message.tolist()
        if failed:
            _gathered(error, None)
        return tuple(numbers)

    def _share_counts(self, batches: list[Batch | None]) -> list[list[int]]:
        """For each micro-batch of the step: its rows and their positions, numbers of samples and images, and
        NUMBERS."""
        if self._loader is not None:
            rows = [
                [
                    *b.input_ids.shape,
                    len(b.sample_ids),
                    b.num_images,
                    *(getattr(b, name) for name in NUMBERS),
                ]
                for b in batches
                if b is not None
            ]
            message = torch.tensor(rows, device=self.groups.device)
        else:
            shape = (len(batches), 4 + len(NUMBERS))
            message = torch.empty(shape, dtype=torch.int64, device=self.groups.device)
        dist.broadcast(message, self.groups.model_leader, group=self.groups.collection.mp)
        return message.tolist()

    def _share(
        self,
        batch: Batch | None,
        num_rows: int,
        length: int,
        num_samples: int,
        num_images: int,
        *numbers: int,
    ) -> Batch:
        """Give the leader's batch to its peers: all but the images in one int64 message."""
        shape = (num_rows, length)
        sizes = [shape[0] * shape[1]] * 3 + [shape[0], num_samples]
        if batch is not None:
            parts = [
                batch.input_ids,
                batch.labels,
                batch.position_ids,
                batch.images_per_sample,
                batch.sample_ids,
            ]
            message = torch.cat([part.reshape(-1) for part in parts]).to(self.groups.device)
        else:
            message = torch.empty(sum(sizes), dtype=torch.int64, device=self.groups.device)
        dist.broadcast(message, self.groups.model_leader, group=self.groups.collection.mp)
        input_ids, labels, position_ids, images_per_sample, sample_ids = message.split(sizes)
        return Batch(
            input_ids.view(shape),
            labels.view(shape),
            position_ids.view(shape),
            self._share_images(batch, num_images),
            images_per_sample,
            sample_ids,
            packed=self.recipe.data.pack,
            **dict(zip(NUMBERS, numbers, strict=True)),
        )

    def _share_images(self, batch: Batch | None, num_images: int) -> torch.Tensor:
        """The images, on the first pipeline stage; none elsewhere."""
        groups, pixels = self.groups, self.recipe.model.vision.image_size
        if not groups.is_first_stage or num_images == 0:
            return torch.empty(0, 3, pixels, pixels, device=groups.device)
        if batch is not None:
            images = batch.images.to(groups.device)
        else:
            images = torch.empty(num_images, 3, pixels, pixels, device=groups.device)
        if groups.tp_size > 1:
            dist.broadcast(images, groups.model_leader, group=groups.collection.tp)
        return images


def sample_cost(recipe: Recipe) -> Cost:
    """What an image and attention cost, by their FLOPs, in positions of the language model."""
    length, window = recipe.data.sequence_length, recipe.model.language.sliding_window
    position = flops_per_step(recipe, 1, 0, num_pairs=0)
    attention = flops_per_step(recipe, 1, 0) - position
    return Cost(
        image=flops_per_step(recipe, 0, 1) / position,
        attention=attention / causal_pairs(length, window) / position,
        window=window,
    )


def _gathered(error: BaseException | None, mine: Any) -> list[Any]:
    """`mine` of every rank; if any has an error, every rank raises: the own one, or what another reported."""
    report = error if isinstance(error, MegammError) else _as_megamm_error(error)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (report, mine))
    if error is not None:
        raise error
    for other, _ in found:
        if other is not None:
            raise other
    return [part for _, part in found]


def _as_megamm_error(error: BaseException | None) -> MegammError | None:
    """An unexpected error in a form that travels; its own rank raises the original."""
    return None if error is None else MegammError(f"reading data failed: {type(error).__name__}: {error}")
