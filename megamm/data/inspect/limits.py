"""What a sample is cut to in training, as far as looking at a dataset needs it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Optional, TypeVar

import numpy as np

from megamm.config import DataConfig, ImageConfig
from megamm.errors import InputError

NO_LIMIT = 1 << 30

Numbers = TypeVar("Numbers", int, np.ndarray)


class Cut(NamedTuple):
    """What is left of a sample.

    Attributes:
        tokens: stored tokens, from the first on; an image counts as one.
        positions, images: they take.
        learnt: one of them carries loss.
        shorter: something was cut off.
    """

    tokens: int
    positions: int
    images: int
    learnt: bool
    shorter: bool


@dataclass(frozen=True)
class Limits:
    """Lengths of a recipe, or numbers given instead of one.

    Attributes:
        tokens_per_image: positions of an image.
        sequence_length: positions of a sample at most; None: it is not cut.
        max_images: of a sample at most; None: as many as it has.
        image: how pictures are decoded.
        image_size: edge in pixels that they are brought to; None: not known.
        rows, row_samples: micro-batches of a step, and sequences that fit into each when packed.
        seed, stage: of the order of samples.
    """

    tokens_per_image: int = 1
    sequence_length: Optional[int] = None
    max_images: Optional[int] = None
    image: ImageConfig = field(default_factory=ImageConfig)
    image_size: Optional[int] = None
    rows: int = 32
    row_samples: int = 1
    seed: int = 1
    stage: str = "train"

    @classmethod
    def of_recipe(cls, path: Path, directory: Path) -> Limits:
        """What the recipe at `path` says of the dataset in `directory`.

        Raises:
            InputError: the recipe is wrong.
        """
        from megamm.recipe import load_recipe

        recipe = load_recipe(path)
        data, training = recipe.data, recipe.training
        return cls(
            tokens_per_image=recipe.model.tokens_per_image,
            sequence_length=_sequence_length(data, directory),
            max_images=data.max_images,
            image=data.image,
            image_size=recipe.model.vision.image_size,
            rows=training.global_batch_size // training.micro_batch_size,
            row_samples=training.micro_batch_size,
            seed=recipe.seed,
            stage=recipe.stage,
        )

    @classmethod
    def of_numbers(
        cls, sequence_length: int | None, tokens_per_image: int | None, max_images: int | None
    ) -> Limits:
        """What the options say; without positions of an image there is no length to cut at.

        Raises:
            InputError: a length without the positions of an image.
        """
        if sequence_length is not None and tokens_per_image is None:
            raise InputError(
                "--sequence-length: says nothing without the positions that an image takes; add "
                "--tokens-per-image, or give --recipe instead of both"
            )
        if (
            sequence_length is not None
            and tokens_per_image is not None
            and tokens_per_image > sequence_length
        ):
            raise InputError(
                f"--tokens-per-image: an image of {tokens_per_image} positions does not fit into "
                f"{sequence_length}; raise --sequence-length"
            )
        return cls(tokens_per_image or 1, sequence_length, max_images)

    @property
    def cuts(self) -> bool:
        """Whether any sample can be cut."""
        return self.sequence_length is not None or self.max_images is not None

    def positions(self, tokens: Numbers, images: Numbers) -> Numbers:
        """Positions of whole samples with these numbers of stored tokens and images: [n] each, or of one."""
        return tokens + (self.tokens_per_image - 1) * images

    def too_large(self, tokens: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Which samples ([n] stored tokens and images) are cut: [n] bool."""
        return (self.positions(tokens, images) > self._longest) | (images > self._most)

    def cuts_one(self, tokens: int, images: int) -> bool:
        """Whether one sample is cut; `too_large` for plain numbers."""
        return self.positions(tokens, images) > self._longest or images > self._most

    def cut(self, tokens: np.ndarray, learnt: np.ndarray, image_id: int) -> Cut:
        """What training keeps of a sample with ids `tokens` [n], learnt where `learnt` [n] is not 0."""
        from megamm.data.assemble import Assembler  # which imports torch

        assembler = Assembler(self.tokens_per_image, image_id, pad_id=0)
        positions, images = assembler.kept(tokens, self._longest, self._most)
        left = positions - (self.tokens_per_image - 1) * images
        total = int(np.count_nonzero(tokens == image_id))
        shorter = positions < self.positions(len(tokens), total) or images < total
        return Cut(left, positions, images, bool(learnt[1:left].any()), shorter)

    @property
    def _longest(self) -> int:
        return NO_LIMIT if self.sequence_length is None else self.sequence_length

    @property
    def _most(self) -> int:
        return NO_LIMIT if self.max_images is None else self.max_images


def _sequence_length(data: DataConfig, directory: Path) -> int:
    """S of the rows that samples of `directory` stand in; of several, the smallest."""
    place = os.path.realpath(directory)  # unlike Path.resolve, it takes links that lead to themselves
    lengths = [s.sequence_length for s in data.sources() if os.path.realpath(s.path) == place]
    return min(lengths, default=data.sequence_length)
