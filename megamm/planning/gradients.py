"""Where gradients are needed: what lies below the first trained parameter keeps nothing for the backward
pass."""

from __future__ import annotations

from dataclasses import dataclass

from megamm.config import Recipe
from megamm.planning.tensors import first_trained_layer, trains_embedding, trains_output_layer, used_blocks


@dataclass(frozen=True)
class GradientFlow:
    """What of a stage of training needs gradients.

    Attributes:
        embeddings: the hidden states below the first decoder layer need one.
        media: so do the media tokens of the gated blocks.
        first_layer: the first decoder layer whose own weights are trained (infinity: none).
        gated, adapters: gated blocks and adapters are trained.
        first_gated: the first layer with a gated block (infinity: none).
        output: the output layer is trained.
        vision_block: the first of the encoder's blocks that is trained, -1 with its embeddings, infinity for
            none.
        connector: the connector is trained.
    """

    embeddings: bool
    media: bool
    first_layer: float
    gated: bool
    adapters: bool
    first_gated: float
    output: bool
    vision_block: float
    connector: bool

    @classmethod
    def of(cls, recipe: Recipe) -> GradientFlow:
        model, training = recipe.model, recipe.training
        vision = _first_vision_block(recipe)
        connector = "connector" not in training.freeze
        media = connector or vision < float("inf")
        cross = model.assembly == "cross_attention"
        every = model.cross_attention.every
        return cls(
            embeddings=trains_embedding(recipe) or (model.assembly == "merged" and media),
            media=cross and media,
            first_layer=first_trained_layer(recipe),
            gated=cross and "cross_attention" not in training.freeze,
            adapters=bool(model.lora.rank) and "lora" not in training.freeze,
            first_gated=(0 if model.cross_attention.stands_before(0) else every - 1)
            if cross
            else float("inf"),
            output=trains_output_layer(recipe),
            vision_block=vision,
            connector=connector,
        )

    def reaches(self, layer: int) -> bool:
        """Whether the hidden states in front of decoder layer `layer` need a gradient (those behind the last
        layer: its number plus 1)."""
        if self.embeddings or self.first_layer < layer or (self.adapters and layer > 0):
            return True
        return (self.gated or self.media) and self.first_gated < layer


def _first_vision_block(recipe: Recipe) -> float:
    if "vision" not in recipe.training.freeze:
        return -1
    first = recipe.training.unfreeze.vision
    return float("inf") if first is None or first >= used_blocks(recipe.model.vision) else first
