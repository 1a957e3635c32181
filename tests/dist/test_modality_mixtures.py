"""Text-only, image-only and mixed micro-batches, different on every data-parallel rank: never a hang.

The harness is the watchdog: it kills all ranks and fails when its time is up.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.engine import groups
from megamm.engine.pipeline import forward_backward
from tests.dist.harness import run_distributed
from tests.dist.tiny import IMAGE_ID, KINDS, VOCAB, tiny_recipe
from tests.dist.workers import Run

MIXTURES = 200
MAX_IMAGES = 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel.tensor": 2, "parallel.sequence": True},
    "pp2": {"parallel.pipeline": 2},
    "dp2": {},
}


def mixed_batch(run: Run, counts: list[int], labelled: bool, seed: int) -> Batch:
    """A micro-batch with these image counts; without labels if asked, as an image without a caption has."""
    recipe, generator = run.recipe, torch.Generator().manual_seed(seed)
    length, span = recipe.data.sequence_length, recipe.model.tokens_per_image
    ids = torch.randint(IMAGE_ID + 1, VOCAB, (len(counts), length), generator=generator)
    for row, count in enumerate(counts):
        for image in range(count):  # back to back, from the start
            ids[row, image * span : (image + 1) * span] = IMAGE_ID
    labels = (
        torch.where(ids == IMAGE_ID, IGNORE_INDEX, ids) if labelled else torch.full_like(ids, IGNORE_INDEX)
    )
    pixels = recipe.model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(length).expand(len(counts), -1),
        images=torch.randn(sum(counts), 3, pixels, pixels, generator=generator),
        images_per_sample=torch.tensor(counts),
        sample_ids=torch.arange(len(counts)),
    )


def train_on_mixtures(overrides: dict[str, Any]) -> dict[str, Any]:
    """A step for each mixture, the kinds of model in turn; what is trained is drawn, too."""
    settings = {"data.max_images": MAX_IMAGES, "training.global_batch_size": 4, **overrides}
    trained = ["[]", "[language]", "[vision, language]", "[vision]"]
    runs = [
        Run(tiny_recipe(kind, {**settings, "training.freeze": freeze}))
        for kind, freeze in zip(KINDS, trained, strict=True)
    ]
    draw = random.Random(0)  # the same on all ranks, so that a copy of the model sees one batch
    losses, num_images = [], []
    for mixture in range(MIXTURES):
        run = runs[mixture % len(runs)]
        num_micro_batches = 2 // run.layout.dp_size
        batches = []
        for dp_rank in range(run.layout.dp_size):
            for number in range(num_micro_batches):
                kind = draw.choice(["text", "images", "mixed"])
                low, high = {"text": (0, 0), "images": (1, MAX_IMAGES), "mixed": (0, MAX_IMAGES)}[kind]
                counts = [draw.randint(low, high) for _ in range(2)]
                batch = mixed_batch(run, counts, draw.random() > 0.1, 1000 * mixture + 10 * dp_rank + number)
                if dp_rank == run.layout.dp_rank:
                    batches.append(batch)
                num_images.append(sum(counts))
        for model in run.wrapped:
            model.zero_grad_buffer()
        losses.append(forward_backward(run.wrapped, batches, run.layout))
        run.optimizer.step()
    groups.shutdown()
    return {"losses": losses, "num_images": num_images}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_mixture_hangs(layout: str) -> None:
    target = "tests.dist.test_modality_mixtures:train_on_mixtures"
    ranks = run_distributed(2, target, {"overrides": LAYOUTS[layout]}, timeout=240)
    for rank in ranks:
        assert len(rank["losses"]) == MIXTURES
        assert all(math.isfinite(loss) for loss in rank["losses"])
        assert rank["losses"] == ranks[0]["losses"]
    assert 0 in ranks[0]["num_images"] and 2 * MAX_IMAGES in ranks[0]["num_images"]
