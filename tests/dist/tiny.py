"""Tiny models and batches for tests of layouts: small enough for many runs, uneven enough to find mistakes
(odd vocabulary, grouped queries, different image counts per sample, text-only samples)."""

from __future__ import annotations

from typing import Any

import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.recipe import recipe_from_dict

IMAGE_ID = 3
VOCAB = 67
LENGTH = 24
# images per sample of the micro-batches, in turn
IMAGE_COUNTS = ([1, 2], [2, 0], [0, 0], [1, 1])


def tiny_recipe(assembly: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A fp32 recipe of two samples per micro-batch and eight per step."""
    merged = assembly == "merged"
    raw = {
        "name": "tiny",
        "run_dir": "unused",
        "tokenizer": "unused",
        "model": {
            "assembly": assembly,
            "language": {
                "num_layers": 4,
                "hidden_size": 64,
                "num_heads": 4,
                "num_kv_heads": 2,
                "ffn_hidden_size": 96,
                "vocab_size": VOCAB,
                "max_positions": 64,
                "init_std": 0.05,
            },
            "vision": {
                "image_size": 16,
                "patch_size": 8,
                "width": 48,
                "num_layers": 3,
                "num_heads": 4,
                "mlp_width": 64,
            },
            "connector": {"kind": "mlp"}
            if merged
            else {"kind": "resampler", "num_latents": 4, "depth": 2, "num_heads": 4, "head_dim": 8},
            "cross_attention": {"every": 2, "num_heads": 4, "head_dim": 8},
        },
        "data": {"train": "unused", "sequence_length": LENGTH, "max_images": 2},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
    }
    return recipe_from_dict(raw, overrides=[f"{key}={value}" for key, value in (overrides or {}).items()])


def tiny_batch(recipe: Recipe, index: int) -> Batch:
    """The index-th micro-batch, the same for every layout."""
    generator = torch.Generator().manual_seed(index)
    size, length = recipe.training.micro_batch_size, recipe.data.sequence_length
    counts = torch.tensor(IMAGE_COUNTS[index % len(IMAGE_COUNTS)])
    ids = torch.randint(IMAGE_ID + 1, VOCAB, (size, length), generator=generator)
    labels = torch.randint(IMAGE_ID + 1, VOCAB, (size, length), generator=generator)
    labels[:, : 2 + index % 5] = IGNORE_INDEX
    span = recipe.model.tokens_per_image
    for row, count in enumerate(counts.tolist()):
        for image in range(count):
            start = 3 + image * 10
            ids[row, start : start + span] = IMAGE_ID
            labels[row, start : start + span] = IGNORE_INDEX
    pixels = recipe.model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(length).expand(size, -1),
        images=torch.randn(int(counts.sum()), 3, pixels, pixels, generator=generator),
        images_per_sample=counts,
        sample_ids=torch.arange(size) + index * size,
    )
