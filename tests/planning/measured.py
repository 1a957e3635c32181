"""The peak of what a step really allocates on the CPU, as torch's allocator reports it to the profiler."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megamm.batch import Batch
from megamm.config import Recipe
from megamm.engine import groups
from megamm.engine.pipeline import forward_backward
from megamm.recipe import recipe_from_dict
from tests.dist.tiny import IMAGE_ID
from tests.dist.workers import Run

VOCAB = 1003
LANGUAGE = {
    "num_layers": 4,
    "hidden_size": 256,
    "num_heads": 4,
    "ffn_hidden_size": 704,
    "vocab_size": VOCAB,
    "max_positions": 4096,
}
VISION = {
    "image_size": 112,
    "patch_size": 14,
    "width": 128,
    "num_layers": 4,
    "num_heads": 4,
    "mlp_width": 512,
}
MERGED: dict[str, Any] = {"assembly": "merged", "connector": {"kind": "mlp"}}
HEADS = {"num_heads": 4, "head_dim": 32}
FLAMINGO: dict[str, Any] = {
    "assembly": "cross_attention",
    "connector": {"kind": "resampler", "num_latents": 16, "depth": 2, **HEADS},
    "cross_attention": {"every": 2, **HEADS},
}
KINDS: dict[str, dict[str, Any]] = {
    "merged": MERGED,
    "flamingo": FLAMINGO,
    "idefics": {
        "assembly": "cross_attention",
        "connector": {**FLAMINGO["connector"], "qk_norm": True},
        "cross_attention": {"geometry": "idefics", "every": 2, "qk_norm": True, "vector_gates": True},
    },
    "qformer": {
        "assembly": "merged",
        "connector": {"kind": "qformer", "num_latents": 16, "depth": 4, **HEADS, "flag_embeddings": True},
    },
}


def recipe_of(kind: str, **overrides: Any) -> Recipe:
    """A recipe whose activations are many times its weights; overrides have __ for dots."""
    raw = {
        "name": "measured",
        "run_dir": "unused",
        "tokenizer": "unused",
        "model": {**KINDS[kind], "language": dict(LANGUAGE), "vision": dict(VISION)},
        "data": {"train": "unused", "sequence_length": 512, "max_images": 2},
        "training": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "precision": "fp32",
            "device": "cpu",
        },
    }
    return recipe_from_dict(raw, overrides=[f"{k.replace('__', '.')}={v}" for k, v in overrides.items()])


class MeasuredRun(Run):
    """A step whose batches are as full as the recipe allows: every row of text, as many images as fit."""

    def forward_backward(self, step: int) -> float:
        for model in self.wrapped:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        return forward_backward(self.wrapped, self.batches, self.layout)

    @property
    def batches(self) -> list[Batch]:
        if not hasattr(self, "_batches"):
            training = self.recipe.training
            per_step = training.global_batch_size // training.micro_batch_size // self.layout.dp_size
            self._batches = [full_batch(self.recipe, i) for i in range(per_step)]
        return self._batches


def full_batch(recipe: Recipe, index: int) -> Batch:
    """A micro-batch with data.max_images in each sample; packed rows of one document for each sample."""
    generator = torch.Generator().manual_seed(index)
    size, length = recipe.training.micro_batch_size, recipe.data.sequence_length
    ids = torch.randint(IMAGE_ID + 1, VOCAB, (size, length), generator=generator)
    span, pixels = recipe.model.tokens_per_image, recipe.model.vision.image_size
    images = recipe.data.max_images
    for image in range(images):
        start = image * (length // images)
        ids[:, start : start + span] = IMAGE_ID
    labels = torch.randint(IMAGE_ID + 1, VOCAB, (size, length), generator=generator)
    positions, counts = torch.arange(length).repeat(size, 1), torch.full((size,), images)
    if recipe.data.pack:
        ids, labels, positions = (x.reshape(1, -1) for x in (ids, labels, positions))
        counts = torch.tensor([size * images])
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        images=torch.randn(size * images, 3, pixels, pixels, generator=generator),
        images_per_sample=counts,
        sample_ids=torch.arange(size) + index * size,
        packed=recipe.data.pack,
    )


def peak_of_step(recipe: Recipe, steps: int = 1) -> int:
    """Bytes of the fullest moment of a step, beyond weights, gradient buffers and batch; the least of
    `steps`."""
    run = MeasuredRun(recipe)
    run.forward_backward(0)  # what is allocated once and kept
    return min(_peak(run) for _ in range(steps))


def _peak(run: MeasuredRun) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.forward_backward(1)
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    total = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        total += size
        peak = max(peak, total)
    assert changes
    return peak


def peaks(cases: list[tuple[str, dict[str, Any]]]) -> list[int]:
    """peak_of_step of several recipes of one layout on this rank, by the names of their models. What a thread
    of gloo frees is not reported, which makes some steps look too large."""
    found = [peak_of_step(recipe_of(kind, **overrides), steps=3) for kind, overrides in cases]
    groups.shutdown()
    return found
