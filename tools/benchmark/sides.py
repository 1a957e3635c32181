"""The two sides of a training step: megamm, and transformers' LLaVA as one would train it.

Both take the same weights and batches. A step is forward, backward and update: gradients cleared, mean loss
over all labelled positions of the step, gradients clipped at norm 1, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.engine.groups import Groups
from megamm.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel
from megamm.engine.pipeline import forward_backward
from megamm.engine.weights import initialize
from megamm.models.vlm import build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RATE = 1e-4
# Largest departure of a side's loss (relative) and of a gradient (its norm, relative): in bf16 both round.
TOLERANCES = {"fp32": (1e-5, 1e-3), "bf16": (5e-3, 6e-2)}

Draw = Callable[[str, tuple[int, ...]], torch.Tensor]


def padding_mask(batch: Batch, pad_id: int) -> torch.Tensor:
    """[B, S] int64: 0 behind the end of each row, as tokenizers give it."""
    filled = batch.input_ids != pad_id
    ends = filled.shape[1] - filled.flip(1).int().argmax(dim=1)
    return (torch.arange(filled.shape[1], device=ends.device) < ends[:, None]).long()


class Ours:
    """A model of megamm with its optimizer.

    Args:
        draw: (name, whole shape) -> the weights; None: some, drawn on the device, where drawing them in order
            on a CPU would take longer than training.
        backend: "local" or "te".
    """

    def __init__(
        self, recipe: Recipe, layout: Groups, draw: Draw | None, image_id: int, backend: str = "local"
    ) -> None:
        self.layout = layout
        self.models = build_model(recipe, layout, backend, image_id)
        if draw is None:
            draw_in_place(self.models)
        else:
            initialize(self.models, draw)
        self.wrapped = wrap_data_parallel(self.models, recipe, layout)
        self.optimizer = build_optimizer(self.wrapped, recipe, layout)
        self.schedule = build_schedule(self.optimizer, recipe.optimizer, 10_000)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(p.numel() for model in self.models for p in model.parameters())

    def backward(self, batches: Sequence[Batch]) -> float:
        """Forward and backward over the micro-batches; the mean loss."""
        for model in self.wrapped:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return forward_backward(self.wrapped, list(batches), self.layout)

    def step(self, batches: Sequence[Batch]) -> float:
        """A whole step; the mean loss."""
        loss = self.backward(batches)
        self.optimizer.step()
        self.schedule.step(1)
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the trained parameters, by name, as the last `backward` left them; copies."""
        return {
            name: p.main_grad.detach().float().clone()
            for model in self.models
            for name, p in model.named_parameters()
            if p.requires_grad
        }


@torch.no_grad()
def draw_in_place(models: Sequence[torch.nn.Module]) -> None:
    """Small random weights, norms that change nothing, gates half open."""
    torch.manual_seed(0)
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("_gate"):
                parameter.fill_(0.5)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(std=0.02)


class Peer:
    """A plain model with torch.optim.AdamW. Subclasses say how a micro-batch becomes a sum of losses."""

    def __init__(self, model: torch.nn.Module, frozen: Sequence[str]) -> None:
        self.model = model.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, fused=True)

    def loss(self, batch: Batch, num_labels: int) -> torch.Tensor:
        """The losses of a micro-batch, summed and divided by the labels of the step."""
        raise NotImplementedError

    def backward(self, batches: Sequence[Batch]) -> float:
        """Forward and backward over the micro-batches; the mean loss."""
        self.optimizer.zero_grad()
        num_labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            loss = self.loss(batch, num_labels)
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self, batches: Sequence[Batch]) -> float:
        """A whole step; the mean loss."""
        loss = self.backward(batches)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the trained parameters, by name, as the last `backward` left them; copies."""
        found = self.model.named_parameters()
        return {name: p.grad.detach().float().clone() for name, p in found if p.grad is not None}


class Transformers(Peer):
    """LlavaForConditionalGeneration.

    Args:
        frozen: parts of names of parameters that are not trained.
        head_at_labels: the output layer runs at positions with loss alone, instead of where the model's own
            loss has it: everywhere.
        pad_id: fills up rows; None: no row is padded, and no mask is given.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype,
        frozen: Sequence[str],
        head_at_labels: bool = False,
        pad_id: int | None = None,
    ) -> None:
        from transformers import LlavaForConditionalGeneration
        from transformers.utils import logging

        logging.disable_progress_bar()
        found: Any = LlavaForConditionalGeneration.from_pretrained(directory, dtype=dtype)
        super().__init__(found, frozen)
        self.dtype, self.head_at_labels, self.pad_id = dtype, head_at_labels, pad_id

    def loss(self, batch: Batch, num_labels: int) -> torch.Tensor:
        model: Any = self.model
        inputs = {
            "input_ids": batch.input_ids,
            "pixel_values": batch.images.to(self.dtype) if batch.num_images else None,
            "attention_mask": None if self.pad_id is None else padding_mask(batch, self.pad_id),
            "use_cache": False,
        }
        if not self.head_at_labels:
            labels = F.pad(batch.labels[:, :-1], (1, 0), value=IGNORE_INDEX)  # the model shifts them itself
            found: torch.Tensor = model(**inputs, labels=labels, num_items_in_batch=num_labels).loss
            return found
        hidden = model.model(**inputs).last_hidden_state
        wanted = batch.labels != IGNORE_INDEX
        logits = model.lm_head(hidden[wanted]).float()
        return F.cross_entropy(logits, batch.labels[wanted], reduction="sum") / num_labels


def assert_equal(
    ours: tuple[float, torch.Tensor], peer: tuple[float, torch.Tensor], precision: str, what: str
) -> float:
    """Whether loss and one gradient agree; the relative departure of the gradient.

    Raises:
        AssertionError: they do not.
    """
    loss_bound, gradient_bound = TOLERANCES[precision]
    assert abs(ours[0] - peer[0]) <= loss_bound * abs(peer[0]), (what, ours[0], peer[0])
    size = float(peer[1].norm())
    departure = float((ours[1] - peer[1]).norm()) / max(size, 1e-30)
    assert size > 0 and departure <= gradient_bound, (what, departure, size)
    return departure


def whole_weights(weights: Mapping[str, torch.Tensor]) -> Draw:
    """Weights that were read, for `Ours`."""
    return lambda name, shape: weights[name].reshape(shape)
