"""The models that `gpu.py` trains, at their real sizes or tiny ones, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from step_sizes import IMAGE_ID, Mixture, Packing, Sample, interleaved_samples, mixture, packing

from megamm.config import Recipe
from megamm.recipe import recipe_from_dict

BIG = {"preset": "vicuna-7b", "max_positions": 8192}  # (of a packed row; samples are shorter)
EYES = {"preset": "clip-vit-l-14-336"}
TINY = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "ffn_hidden_size": 128, "vocab_size": 512}
TINY_EYES = {
    "image_size": 28,
    "patch_size": 14,
    "width": 32,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_width": 64,
}
LAYERS_65B = 2
WIDE = {
    "num_layers": LAYERS_65B,
    "hidden_size": 8192,
    "num_heads": 64,
    "ffn_hidden_size": 22016,
    "vocab_size": 32000,
    "max_positions": 8192,
}


@dataclass(frozen=True)
class Training:
    """A stage on one GPU.

    Attributes:
        values: of the recipe's model; `tiny` is the same at a size for a CPU.
        freeze: what is not trained.
        positions: of a packed row, of which a step has `rows`; `tiny_positions` likewise.
        samples: (recipe, number) -> so many samples.
    """

    values: dict[str, Any]
    tiny: dict[str, Any]
    freeze: list[str]
    positions: int
    tiny_positions: int
    samples: Callable[[Recipe, int], list[Sample]]
    rows: int = 2
    fp8: str = "off"

    def recipe(self, is_tiny: bool, backend: str) -> Recipe:
        """Packed rows of one micro-batch each; whole sizes are in bf16, tiny ones too."""
        positions = self.tiny_positions if is_tiny else self.positions
        return recipe_from_dict(
            {
                "name": "benchmark",
                "run_dir": "unused",
                "tokenizer": "unused",
                "model": self.tiny if is_tiny else self.values,
                "data": {"sequence_length": positions, "max_images": 64, "pack": True},
                "training": {
                    "global_batch_size": self.rows,
                    "micro_batch_size": 1,
                    "precision": "bf16",
                    "freeze": self.freeze,
                    "fp8": {"scaling": self.fp8, "amax_history": 16},
                },
                "optimizer": {"lr": 1e-4, "schedule": "constant"},
                "parallel": {"backend": backend},
            }
        )

    def packing(self, recipe: Recipe) -> Packing:
        """Which samples a step takes, without their images."""
        data = recipe.data
        return packing(
            self._samples(recipe),
            recipe.model.tokens_per_image,
            self.rows,
            data.sequence_length,
            data.max_images,
        )

    def batches(self, recipe: Recipe) -> Mixture:
        """The same samples packed and, two at a time (more have no room), padded to the longest."""
        data, size = recipe.data, recipe.model.vision.image_size
        limits = self.rows, data.sequence_length, data.max_images
        return mixture(self._samples(recipe), recipe.model.tokens_per_image, size, *limits, at_once=2)

    def _samples(self, recipe: Recipe) -> list[Sample]:
        """More than go into the rows."""
        capacity = recipe.data.sequence_length
        return self.samples(recipe, self.rows * capacity // (8 if capacity < 1000 else 128))


def captions(recipe: Recipe, count: int) -> list[Sample]:
    """An image and 20 to 100 tokens about it, all of which carry loss (LLaVA's alignment data)."""
    draw, vocab = np.random.default_rng(3), recipe.model.language.vocab_size
    least, most = (20, 100) if recipe.data.sequence_length > 1000 else (4, 12)
    found = []
    for length in draw.integers(least, most + 1, count).tolist():
        ids = draw.integers(IMAGE_ID + 1, vocab, length + 1)
        ids[0] = IMAGE_ID
        found.append((ids, ids != IMAGE_ID))
    return found


def conversations(recipe: Recipe, count: int) -> list[Sample]:
    """An image and a long conversation, two fifths of whose text carry loss (LLaVA's instruction data)."""
    found = []
    for ids, learnt in captions(recipe, count):
        text = np.tile(ids[1:], 5)
        all_ids = np.concatenate([ids[:1], text])
        late = np.arange(len(all_ids)) >= len(all_ids) - 2 * len(text) // 5
        found.append((all_ids, late & np.append(learnt[:1], np.ones(len(text), bool))))
    return found


def documents(recipe: Recipe, count: int) -> list[Sample]:
    """Web pages: text with up to eight images in it, a quarter of a row to half a row long."""
    length = recipe.data.sequence_length // 2
    images = 8 if length > 500 else 2
    return interleaved_samples(recipe.model.language.vocab_size, length, images, count, False)


def _llava(language: dict[str, Any], eyes: dict[str, Any]) -> dict[str, Any]:
    return {"assembly": "merged", "connector": {"kind": "mlp"}, "language": language, "vision": eyes}


def _flamingo(language: dict[str, Any], eyes: dict[str, Any], every: int, depth: int) -> dict[str, Any]:
    return {
        "assembly": "cross_attention",
        "connector": {"kind": "resampler", "depth": depth},
        "cross_attention": {"every": every, "gate_init": 0.5},
        "language": language,
        "vision": eyes,
    }


LLAVA, TINY_LLAVA = _llava(BIG, EYES), _llava(TINY, TINY_EYES)
FROZEN = ["vision", "language"]
TRAININGS = {
    "alignment": Training(LLAVA, TINY_LLAVA, FROZEN, 8192, 64, captions),
    "flamingo": Training(
        *(_flamingo(BIG, EYES, 4, 6), _flamingo(TINY, TINY_EYES, 2, 1), FROZEN, 4096, 64, documents)
    ),
    # (weights, gradients and optimizer state leave room for short rows, of which nothing is computed again)
    "finetuning": Training(LLAVA, TINY_LLAVA, ["vision"], 2048, 64, conversations, 8),
    "bf16 layers": Training(_llava(WIDE, EYES), TINY_LLAVA, ["vision"], 8192, 64, conversations),
    "fp8 layers": Training(
        _llava(WIDE, EYES), TINY_LLAVA, ["vision"], 8192, 64, conversations, fp8="delayed"
    ),
}
