"""What is trained on: sources, rows, pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import PurePath
from typing import Literal, NamedTuple, Optional, Union


@dataclass
class ImageConfig:
    """How pictures become tensors.

    Attributes:
        loader: "dali", "pillow", or "auto" (DALI where it works).
        fit: "squash" resizes to the square, "crop" resizes the shorter edge and crops the centre,
            "pad" pads to a square with the mean colour first.
        random_crop_scale: training only; crop a random area of at least this share of the picture
            and resize it (1.0 switches it off). Evaluation never crops at random.
        random_flip: training only; mirror left-right with probability one half.
        mean, std: per channel, for values in [0, 1].
        scaled_decode: decode a JPEG at 1/2, 1/4 or 1/8 of its size where that is still at least as large as
            what is made of it: two to three times as fast, and one or two of 255 levels off on average. null:
            in training alone.
        decode_device: "gpu" decodes and resizes on the GPU of the training process (DALI, data.workers 0);
            "auto" is "cpu".
        max_pixels: larger pictures are refused before they are decoded.
        num_workers: decoding threads of each loading process.
    """

    loader: Literal["auto", "dali", "pillow"] = "auto"
    fit: Literal["squash", "crop", "pad"] = "crop"
    random_crop_scale: float = 1.0
    random_flip: bool = False
    mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])
    scaled_decode: Optional[bool] = None
    decode_device: Literal["auto", "cpu", "gpu"] = "auto"
    max_pixels: int = 64_000_000
    num_workers: int = 1


@dataclass
class SourceConfig:
    """One of several datasets that are trained on together. Either all have a weight, or all have epochs, or
    none has either: then each counts as one epoch.

    Attributes:
        path: a directory written by `megamm prepare`.
        weight: its part of the samples, compared with the other weights.
        epochs: how often each of its samples comes while those of a source of one epoch come once.
        sequence_length: S of its rows; None means data.sequence_length. Sources of different S never share
            a step.
        name: in logs and checkpoints, and part of the key of its order; None means the last part of the path.
    """

    path: str
    weight: Optional[float] = None
    epochs: Optional[float] = None
    sequence_length: Optional[int] = None
    name: Optional[str] = None


class NamedSource(NamedTuple):
    """A source with everything that its recipe leaves to defaults. `rate` is its weight or its epochs."""

    name: str
    path: str
    sequence_length: int
    rate: Fraction
    by_weight: bool


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        train: a directory written by `megamm prepare`, or a list of several, each with its share. How long
            the stage is, training.steps says.
        sequence_length: S; shorter samples are padded, longer ones truncated (never inside an image).
        pure_batches: samples with images and those without never share a step.
        pack: fill rows with several whole samples, each of which attends to itself alone. A micro-batch is
            then one row of micro_batch_size * sequence_length positions, and global_batch_size counts rows
            of sequence_length. Off: one sample per row, padded.
        balance: deal the samples of a step over its micro-batches so that they cost about the same (text
            and images both counted); which samples a step has does not change.
        max_images: per sample; a sample with more is cut before the first image too many. With `pack`, a
            micro-batch has at most micro_batch_size times as many.
        max_bad_images: stop the run when more than this share of samples had to be replaced.
        prefetch: micro-batches prepared ahead.
        workers: loader processes of each reading rank; 0 loads in a thread of the training process.
    """

    train: Optional[Union[str, list[SourceConfig]]] = None
    sequence_length: int = 2048
    pure_batches: bool = False
    pack: bool = False
    balance: bool = True
    max_images: int = 8
    image: ImageConfig = field(default_factory=ImageConfig)
    max_bad_images: float = 0.05
    prefetch: int = 4
    workers: int = 0

    def sources(self) -> list[NamedSource]:
        """The datasets of `train`, with all defaults filled in."""
        given = [SourceConfig(self.train)] if isinstance(self.train, str) else self.train or []
        by_weight = any(source.weight is not None for source in given)
        return [
            NamedSource(
                source.name or PurePath(source.path).name,
                source.path,
                source.sequence_length or self.sequence_length,
                _as_written((source.weight if by_weight else source.epochs) or 1.0),
                by_weight,
            )
            for source in given
        ]

    def sequence_lengths(self) -> list[int]:
        """Every S that rows may have, each once."""
        lengths = [source.sequence_length for source in self.sources()]
        return list(dict.fromkeys(lengths or [self.sequence_length]))


def _as_written(number: float) -> Fraction:
    """0.1 as one tenth, not as the binary number that comes close to it."""
    return Fraction(str(number))
