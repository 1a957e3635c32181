"""From the loader to every rank: one process per copy of the model reads, the others are told.

The reader ("model leader") is tensor rank 0 of the first pipeline stage. Tokens go to all ranks of its
copy of the model, images only to the first stage, which encodes them. A failure of one reader reaches
every rank of the run before anyone waits in a collective for it.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.data.loader import BatchLoader
from megamm.data.tokenizer import Tokenizer
from megamm.engine.groups import Groups
from megamm.errors import MegammError


class BatchFeed:
    """The micro-batches of each step, on this rank's device.

    Attributes:
        seconds_waited: for data, during the last step.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Tokenizer, groups: Groups, consumed_samples: int, quarantine: Path
    ) -> None:
        self.recipe, self.groups = recipe, groups
        self.seconds_waited = 0.0
        self.num_micro_batches = recipe.training.global_batch_size // (
            recipe.training.micro_batch_size * groups.dp_size
        )
        self._loader: BatchLoader | None = None
        error: BaseException | None = None
        if groups.is_model_leader:
            try:
                self._loader = BatchLoader(
                    recipe, tokenizer, consumed_samples, groups.dp_rank, groups.dp_size, quarantine
                )
            except Exception as caught:
                error = caught
        self._agree(error)

    @property
    def image_loader(self) -> str:
        """Name of the image loader in use ("" on ranks that do not read)."""
        return self._loader.image_loader.name if self._loader else ""

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step, the same on all ranks of one copy of the model.

        Raises:
            MegammError: reading failed, here or on another rank.
        """
        started = time.perf_counter()
        batches: list[Batch | None] = [None] * self.num_micro_batches
        error: BaseException | None = None
        if self._loader is not None:
            try:
                batches = [next(self._loader) for _ in batches]
            except Exception as caught:
                error = caught
        self._agree(error)
        self.seconds_waited = time.perf_counter() - started
        return [self._share(batch) for batch in batches]

    def remarks(self) -> list[str]:
        """What the user should know about the samples read so far, by this rank."""
        if self._loader is None:
            return []
        stats, length = self._loader.stats, self.recipe.data.sequence_length
        counts = {
            f"cut, being longer than data.sequence_length {length} or data.max_images": stats.truncated,
            "without any token that carries loss": stats.without_loss,
        }
        return [f"{n:,} of {stats.samples:,} samples read were {what}" for what, n in counts.items() if n]

    def close(self) -> None:
        """Stop reading."""
        if self._loader is not None:
            self._loader.close()

    def _agree(self, error: BaseException | None) -> None:
        """If any rank has an error, every rank raises: the own one, or what another rank reported."""
        failed = torch.tensor([int(error is not None)], device=self.groups.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(failed)
        if not int(failed):
            return
        reports: list[BaseException | None] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, error if isinstance(error, MegammError) else _as_megamm_error(error))
        raise error or next(report for report in reports if report is not None)

    def _share(self, batch: Batch | None) -> Batch:
        """Give the leader's batch to its peers."""
        groups = self.groups
        if groups.tp_size * groups.pp_size == 1:
            assert batch is not None
            return batch.to(groups.device)
        size, length = self.recipe.training.micro_batch_size, self.recipe.data.sequence_length
        tokens = self._share_tokens(batch, size, length)
        input_ids, labels, position_ids = tokens[: 3 * size * length].view(3, size, length)
        images_per_sample, sample_ids = tokens[3 * size * length : -1].view(2, size)
        images = self._share_images(batch, int(images_per_sample.sum()))
        return Batch(input_ids, labels, position_ids, images, images_per_sample, sample_ids, int(tokens[-1]))

    def _share_tokens(self, batch: Batch | None, size: int, length: int) -> torch.Tensor:
        """Everything but the images in one int64 message."""
        if batch is not None:
            parts = [
                batch.input_ids,
                batch.labels,
                batch.position_ids,
                batch.images_per_sample,
                batch.sample_ids,
            ]
            flat = [part.reshape(-1) for part in parts] + [torch.tensor([batch.num_skipped])]
            message = torch.cat(flat).to(self.groups.device)
        else:
            num_values = 3 * size * length + 2 * size + 1
            message = torch.empty(num_values, dtype=torch.int64, device=self.groups.device)
        dist.broadcast(message, self.groups.model_leader, group=self.groups.collection.mp)
        return message

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


def _as_megamm_error(error: BaseException | None) -> MegammError | None:
    """An unexpected error in a form that travels; its own rank raises the original."""
    return None if error is None else MegammError(f"reading data failed: {type(error).__name__}: {error}")
