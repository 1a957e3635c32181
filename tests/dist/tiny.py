"""Tiny models and batches for tests of layouts: small enough for many runs, uneven enough to find mistakes
(odd vocabulary, grouped queries, different image counts per sample, text-only samples)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.models.initialization import weight_drawer
from megamm.recipe import recipe_from_dict

IMAGE_ID = 3
VOCAB = 67
LENGTH = 24
# images per sample of the micro-batches, in turn
IMAGE_COUNTS = ([1, 2], [2, 0], [0, 0], [1, 1])


HEADS = {"num_heads": 4, "head_dim": 8}
RESAMPLER = {"kind": "resampler", "num_latents": 4, "depth": 2, **HEADS}
# the "model" section of each kind, apart from language model and vision encoder
KINDS: dict[str, dict[str, Any]] = {
    "merged": {"assembly": "merged", "connector": {"kind": "mlp"}},
    "qformer": {
        "assembly": "merged",
        "connector": {"kind": "qformer", "num_latents": 4, "depth": 3, **HEADS, "flag_embeddings": True},
    },
    "cross_attention": {
        "assembly": "cross_attention",
        "connector": RESAMPLER,
        "cross_attention": {"every": 2, **HEADS},
    },
    "idefics": {
        "assembly": "cross_attention",
        "connector": {**RESAMPLER, "activation": "relu", "qk_norm": True},
        "cross_attention": {"geometry": "idefics", "every": 2, "qk_norm": True, "vector_gates": True},
    },
}


# adapters on every linear of the decoder, which is frozen, with dropout
LORA: dict[str, Any] = {
    "model.lora.rank": 4,
    "model.lora.alpha": 6,
    "model.lora.dropout": 0.25,
    "model.lora.targets": "[q, k, v, o, gate, up, down]",
    "training.freeze": "[vision, language]",
}


def tiny_recipe(kind: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A fp32 recipe of two samples per micro-batch and eight per step, of one of KINDS."""
    raw = {
        "name": "tiny",
        "run_dir": "unused",
        "tokenizer": "unused",
        "model": {
            **KINDS[kind],
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
        },
        "data": {"train": "unused", "sequence_length": LENGTH, "max_images": 2},
        "training": {"steps": 10, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
    }
    return recipe_from_dict(raw, overrides=[f"{key}={value}" for key, value in (overrides or {}).items()])


def draw_visible(recipe: Recipe, gate: float = 0.5) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Initial weights with open gates and adapters that add something: as they start, they would hide
    themselves from every comparison."""
    draw = weight_drawer(recipe.model, recipe.seed)

    def visible(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if ".lora." in name and name.endswith(".b"):
            return draw(f"{name[:-1]}b.a", shape)  # as if it were an A
        return draw(name, shape) + (gate if name.endswith("_gate") else 0.0)

    return visible


def tiny_batch(recipe: Recipe, index: int) -> Batch:
    """The index-th micro-batch, the same for every layout; packed if the recipe says so."""
    if recipe.data.pack:
        return _packed_batch(recipe, index)
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


# documents of a packed row: (length, images); what they leave of the row is padding
DOCUMENTS = (
    ((14, 1), (7, 0), (20, 1)),
    ((24, 2), (5, 0), (19, 0)),
    ((9, 0), (1, 0), (22, 0)),
    ((16, 1), (12, 1), (3, 0), (12, 1)),
)


def _packed_batch(recipe: Recipe, index: int) -> Batch:
    """One row of several documents: images in some, the first at its very start, and padding behind."""
    generator = torch.Generator().manual_seed(1000 + index)
    length = recipe.training.micro_batch_size * recipe.data.sequence_length
    layout = DOCUMENTS[index % len(DOCUMENTS)]
    span = recipe.model.tokens_per_image
    ids = torch.randint(IMAGE_ID + 1, VOCAB, (1, length), generator=generator)
    labels = torch.randint(IMAGE_ID + 1, VOCAB, (1, length), generator=generator)
    positions, start = torch.zeros(1, length, dtype=torch.int64), 0
    for size, num_images in layout:
        positions[0, start : start + size] = torch.arange(size)
        for image in range(num_images):
            first = start + image * 10
            ids[0, first : first + span] = IMAGE_ID
            labels[0, first : first + span] = IGNORE_INDEX
        labels[0, start + size - 1] = IGNORE_INDEX
        start += size
    positions[0, start:] = torch.arange(length - start)
    labels[0, start:] = IGNORE_INDEX
    num_images, pixels = sum(n for _, n in layout), recipe.model.vision.image_size
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        images=torch.randn(num_images, 3, pixels, pixels, generator=generator),
        images_per_sample=torch.tensor([num_images]),
        sample_ids=torch.arange(len(layout)),
        packed=True,
    )
