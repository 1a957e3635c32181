"""Whole models against their references: logits, loss and every gradient, by one process and by two.

A reference is any function from a batch to logits; its weights go through the conversion table under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import DataConfig, ModelConfig, Recipe, TrainingConfig
from megamm.convert.rules import Table
from tests.dist.harness import run_distributed
from tests.dist.workers import whole_tensors

TOLERANCE = 1e-5


@dataclass
class Reference:
    """A model of another library, the same one as `model`.

    Attributes:
        weights: theirs, by the names that the table knows (or their aliases).
        logits: [B, S, V] of a batch.
        names: from their parameters' names in memory to those in files.
        freeze: our parts that the reference gives no gradients.
    """

    model: ModelConfig
    table: Table
    module: nn.Module
    logits: Callable[[Batch], torch.Tensor]
    batch: Batch
    image_id: int
    names: Callable[[str], str] = str
    freeze: tuple[str, ...] = ()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {self.table.canonical(self.names(key)): p for key, p in self.module.named_parameters()}


def text_and_images(
    vocab_size: int, image_id: int, span: int, image_size: int, length: int = 20, seed: int = 0
) -> Batch:
    """Three samples: one with two images and text before them, one without, one that starts with an image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab_size, (3, length), generator=generator)
    ids[ids == image_id] = image_id + 1 if image_id + 1 < vocab_size else 1
    counts = torch.tensor([2, 0, 1])
    for row, start in ((0, 2), (0, 4 + span), (2, 0)):
        ids[row, start : start + span] = image_id
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORE_INDEX)], dim=1)
    labels[labels == image_id] = IGNORE_INDEX
    labels[:, :3] = IGNORE_INDEX
    pixels = torch.randn(3, 3, image_size, image_size, generator=generator)
    positions = torch.arange(length).expand(3, -1)
    return Batch(ids, labels, positions, pixels, counts, torch.arange(3))


def by_sample(batch: Batch, image_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T, 3, height, width] images, zero where a sample has fewer, and [B, S, T] which of them each
    position attends to: the latest before it."""
    per_sample = batch.images.split(batch.images_per_sample.tolist())
    most = int(batch.images_per_sample.max())
    images = torch.stack([F.pad(x, (0, 0) * 3 + (0, most - len(x))) for x in per_sample])
    is_image = batch.input_ids == image_id
    latest = is_image.cumsum(dim=1)  # counted from 1
    return images, latest[..., None] == torch.arange(1, most + 1)


def text_only(vocab_size: int, length: int = 20) -> Batch:
    """Two samples without images, for language models."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab_size, (2, length), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORE_INDEX)], dim=1)
    labels[:, :3] = IGNORE_INDEX
    empty, none = torch.empty(0, 3, 16, 16), torch.zeros(2, dtype=torch.int64)
    return Batch(ids, labels, torch.arange(length).expand(2, -1), empty, none, torch.arange(2))


def check(references: dict[str, Reference], folder: Path, tensor: int) -> float:
    """Compare all of them in one layout; returns the largest difference of logits."""
    for name, reference in references.items():
        _write(reference, folder / f"{name}.pt")
    args = {"folder": str(folder), "tensor": tensor}
    ranks = run_distributed(tensor, "tests.parity.workers:run_cases", args, timeout=200)
    return max(_compare(name, ref, [rank[name] for rank in ranks]) for name, ref in references.items())


def _write(reference: Reference, path: Path) -> None:
    theirs = {key: p.detach() for key, p in reference.parameters().items()}
    weights = {
        rule.ours: rule.to_ours([theirs[key] for key in rule.theirs]) for rule in reference.table.rules
    }
    batch = reference.batch
    recipe = Recipe("parity", "unused", "unused", reference.model)
    recipe.data = DataConfig(sequence_length=batch.input_ids.shape[1], max_images=2)
    recipe.training = TrainingConfig(
        precision="fp32", micro_batch_size=len(batch.input_ids), freeze=list(reference.freeze)
    )
    torch.save({"recipe": recipe, "weights": weights, "batch": batch, "image_id": reference.image_id}, path)


def _compare(name: str, reference: Reference, results: list[dict[str, Any]]) -> float:
    batch, vocab_size = reference.batch, reference.model.language.vocab_size
    reference.module.zero_grad()
    wanted = reference.logits(batch)
    loss = F.cross_entropy(wanted.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE_INDEX)
    loss.backward()
    wanted, loss = wanted.detach(), loss.detach()
    assert wanted.std() > 0.1, name  # the comparison is not one of zeros
    worst = 0.0
    for result in results:
        found = result["logits"][..., :vocab_size]
        assert found.shape == wanted.shape, name
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=f"{name}: logits")
        worst = max(worst, float((found - wanted).abs().max()))
        assert abs(result["loss"] - float(loss)) <= 1e-6 * float(loss), name
    _compare_gradients(name, reference, whole_tensors(results, "gradients"))
    return worst


def _compare_gradients(name: str, reference: Reference, ours: dict[str, torch.Tensor]) -> None:
    """Every gradient of theirs has its counterpart, equal beside its largest element."""
    theirs = {key: p.grad for key, p in reference.parameters().items()}
    gates = [g.abs().max() for key, g in theirs.items() if g is not None and _is_gate(key)]
    largest_gate = max(gates, default=torch.tensor(0.0))
    num_compared = 0
    for rule in reference.table.rules:
        wanted = [theirs.pop(key) for key in rule.theirs]
        if wanted[0] is None or not any(g.any() for g in wanted if g is not None):
            assert rule.ours not in ours or not ours[rule.ours].any(), f"{name}: {rule.ours}"
            continue
        for key, found, gradient in zip(rule.theirs, rule.to_theirs(ours[rule.ours]), wanted, strict=True):
            assert gradient is not None
            # a gate is one number, whose gradient is a sum that may cancel: it counts against the largest
            size = largest_gate if _is_gate(key) else gradient.abs().max()
            difference = (found - gradient).abs().max()
            # what is added to all keys alike changes no softmax, so such gradients are rounding: 1e-7
            assert difference <= TOLERANCE * size + 1e-7, (name, key, float(difference), float(size))
            num_compared += 1
    assert num_compared > 15, name


def _is_gate(key: str) -> bool:
    return "alpha_" in key or key.endswith("_gate")
