"""Encoders whose weights were trained at another image size than the recipe wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megamm.config import ModelConfig, VisionConfig
from megamm.convert.rules import Rule, Shape
from megamm.models.vision.positions import resize_positions


@dataclass(frozen=True)
class ResizedPositions(Rule):
    """Position embeddings interpolated to `side` patches a side. Import only: there is no exact way back.

    Attributes:
        plain: the rule at the size of the source.
    """

    plain: Rule
    side: int

    @property
    def theirs(self) -> tuple[str, ...]:
        return self.plain.theirs

    def their_shapes(self) -> list[Shape]:
        return self.plain.their_shapes()

    def our_shape(self) -> Shape:
        return (1 + self.side**2, *self.plain.our_shape()[1:])

    def to_ours(self, tensors: Sequence[Tensor]) -> Tensor:
        return resize_positions(self.plain.to_ours(tensors), self.side)


def wanted_size(source: VisionConfig, wanted: ModelConfig | None) -> VisionConfig:
    """The encoder of a source at the image size that a recipe wants of it, if the recipe says that its
    weights come from the size of the source (`weights_image_size`)."""
    if wanted is None or wanted.vision.weights_image_size != source.image_size:
        return source
    return replace(source, image_size=wanted.vision.image_size)


def resized(rules: list[Rule], source: VisionConfig, wanted: VisionConfig) -> list[Rule]:
    """The rules of an encoder, with its positions interpolated from `source`'s image size to `wanted`'s."""
    if source.image_size == wanted.image_size:
        return rules
    side = wanted.image_size // wanted.patch_size
    return [
        ResizedPositions(rule.ours, rule, side) if rule.ours == "vision.position_embedding" else rule
        for rule in rules
    ]
