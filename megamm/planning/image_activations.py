"""What encoder and connector keep for the backward pass and take while they run, in bytes, from the recipe
alone.

Shapes: N images of a micro-batch, P features of an image, W vision width, L latents, T tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megamm.config import Recipe
from megamm.planning.activations import element_size
from megamm.planning.gradients import GradientFlow
from megamm.planning.tensors import used_blocks


def images_of_micro_batch(recipe: Recipe) -> int:
    """The most images that a micro-batch may hold: data.max_images of each sample, or as many as its
    positions have room for. (How many there are on average, only the data say.)"""
    return recipe.training.micro_batch_size * images_of_row(recipe)


def images_of_row(recipe: Recipe) -> int:
    """The most images that a sample (if packed, a row on average) may hold."""
    room = max(1, (max(recipe.data.sequence_lengths()) - 1) // recipe.model.tokens_per_image)
    return min(recipe.data.max_images, room)


def images_in_memory(recipe: Recipe, images: float | None) -> int:
    """Images of a micro-batch that a plan makes room for: `images` in each row, or if nobody said so, as many
    as there may be."""
    most = images_of_micro_batch(recipe)
    return most if images is None else min(most, math.ceil(images * recipe.training.micro_batch_size))


def media_tokens(recipe: Recipe, images: int) -> int:
    """M x B: latents that the gated blocks of a micro-batch see. Between pipeline stages every sample is
    padded to data.max_images."""
    if recipe.model.assembly != "cross_attention":
        return 0
    if recipe.parallel.pipeline > 1:
        images = recipe.data.max_images * recipe.training.micro_batch_size
    return images * recipe.model.connector.num_latents


@dataclass(frozen=True)
class ImageBytes:
    """Encoder and connector of a micro-batch.

    Attributes:
        kept: from the forward to the backward pass: features, and what lies between.
        working: what the forward pass takes at a time, on top.
    """

    kept: int
    working: int


def image_bytes(recipe: Recipe, images: int) -> ImageBytes:
    """Of `images` in a micro-batch, dealt over the tensor-parallel ranks."""
    flow = GradientFlow.of(recipe)
    own_images = -(-images // recipe.parallel.tensor)
    encoder, working = _encoder(recipe, flow, own_images)
    connector = {"mlp": _projector, "resampler": _resampler, "qformer": _qformer}[recipe.model.connector.kind]
    below = flow.vision_block < float("inf")
    kept = connector(recipe, images, flow.connector, below) * element_size(recipe)
    if recipe.training.recompute.connector and kept:
        v = recipe.model.vision
        again, kept = kept, images * v.num_features * v.width * element_size(recipe)
        working = max(working, again - kept)
    return ImageBytes(encoder + kept, working)


def _encoder(recipe: Recipe, flow: GradientFlow, images: int) -> tuple[int, int]:
    """(kept, working) of the encoder's blocks."""
    v, e = recipe.model.vision, element_size(recipe)
    positions = images * (1 + v.num_patches)
    first = flow.vision_block
    trained = max(0, used_blocks(v) - max(0, int(first))) if first < float("inf") else 0
    gated = v.activation == "swiglu"
    # input, normed input, queries, keys and values, attention's output; input, normed input (or, normed at
    # the end: what the norms take)
    per_position = 8 * v.width
    if v.rotary_side is not None:
        per_position += 2 * v.width  # turned queries and keys
    activation = {"quick_gelu": 3, "gelu": 2, "swiglu": 3}[v.activation] * v.mlp_width
    per_position += activation
    if v.sub_norm:
        per_position += v.width + v.mlp_width
    block = positions * (per_position * e + 4 * v.num_heads)
    if trained and recipe.training.recompute.vision:
        kept, again = trained * positions * v.width * e, block
    else:
        kept, again = trained * block, 0
    pixels = images * 3 * v.image_size**2 * e
    if first < 0:
        kept += pixels if e != 4 else 0  # the images in lower precision
        kept += positions * v.width * e * v.pre_norm
    inner = (2 if gated else 1) * v.mlp_width
    attention = (2 + 3 + 1 + (4 if v.rotary_side is not None else 0)) * v.width
    feed_forward = 2 * v.width + max(activation, inner + v.mlp_width * (1 + v.sub_norm))
    embedding = 3 * v.width
    working = positions * max(attention, feed_forward, embedding) * e + (pixels if e != 4 else 0)
    return kept, max(working, again)


def _projector(recipe: Recipe, images: int, own: bool, below: bool) -> int:
    """LLaVA's two linears: their inputs and that of GELU."""
    v, hidden = recipe.model.vision, recipe.model.language.hidden_size
    if not (own or below):
        return 0
    return images * v.num_features * (hidden + (v.width + hidden) * own)


def _resampler(recipe: Recipe, images: int, own: bool, below: bool) -> int:
    if not (own or below):
        return 0
    c, v, tensor = recipe.model.connector, recipe.model.vision, recipe.parallel.tensor
    inner, width = c.num_heads * c.head_dim // tensor, v.width
    latents, features = images * c.num_latents, images * v.num_features
    feed_forward = c.ffn_multiple * width // tensor
    # norms' inputs; keys and values, queries and output
    layer = 2 * latents * width + (features + latents) * 2 * inner + 2 * latents * inner
    layer += latents * feed_forward
    if c.qk_norm:
        layer += (features + 2 * latents) * inner
    if own:  # inputs of the linears
        layer += (features + latents) * width + latents * (2 * width + inner + feed_forward)
    return c.depth * layer + features * width + latents * width * (1 + own)


def _qformer(recipe: Recipe, images: int, own: bool, below: bool) -> int:
    if not (own or below):
        return 0
    c, v, tensor = recipe.model.connector, recipe.model.vision, recipe.parallel.tensor
    width = c.num_heads * c.head_dim
    inner, feed_forward = width // tensor, c.ffn_multiple * width // tensor
    queries, features = images * c.num_latents, images * v.num_features
    own_attention = queries * (4 * inner + width + (width + inner) * own)
    cross_attention = queries * (2 * inner + width + (width + inner) * own) + features * 2 * inner
    rest = queries * (feed_forward + width + (width + feed_forward) * own)
    crossed = len(range(0, c.depth, c.cross_every))
    layers = c.depth * (own_attention + rest) + crossed * cross_attention
    return layers + features * v.width * (1 + own) + queries * width * own
