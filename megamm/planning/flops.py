"""Model FLOPs of a step, of which MFU is the rate as a share of the peak (`hardware.peak_flops`).

Counted are the matrix multiplications that the maths needs, not what an implementation happens to do:
no recomputation, no padding of the vocabulary, causal attention at half of the square, embeddings
free. A linear layer of P weights costs, for each position,

    2 P (1 + [gradient of its input needed] + [its weights trained])

which is 6 P for trained weights, 4 P for frozen weights that gradients cross, and 2 P where no
gradient is needed (a frozen encoder, or the layers below the first trainable one). Attention has no
weights: causal self-attention over s positions of width d costs 2 s d forward for each position, and
three times as much where gradients cross (6 s d).
An adapter of rank r is two linear layers, of r times the inputs and r times the outputs.
Everything is a sum over the whole batch, on all devices together.

`hardware_flops_per_step` adds what training.recompute executes a second time (HFU): the forward pass of
decoder layers, of their attention or MLP, of encoder blocks, of the connector, where gradients cross them
(elsewhere nothing was to be kept, and nothing is computed again). The last product of a decoder layer is
counted, too: parallel linears compute it again, plain ones (one tensor-parallel rank on the local backend) do
not, as nothing needs its result. What kernels recompute inside (the scores
of flash attention) is not counted, as in the published figures.
"""

from __future__ import annotations

import math

from megamm.config import Recipe
from megamm.planning.layout import stage_layers
from megamm.recipe_checks import trainable_parts


def flops_per_step(
    recipe: Recipe,
    num_tokens: float,
    num_images: float,
    num_labels: float | None = None,
    num_pairs: float | None = None,
    sequence_length: int | None = None,
) -> float:
    """Model FLOPs (forward and backward) of a batch.

    Args:
        recipe: the model, and what of it is frozen.
        num_tokens: positions of the language model, in all samples of the batch together.
        num_images: images in all samples of the batch together.
        num_labels: positions that carry loss, and so need the output layer; None: all.
        num_pairs: of positions that attend to each other; None: as many as in rows of that length.
        sequence_length: S of the rows; None: data.sequence_length.
    """
    parts = flops_by_part(recipe, num_tokens, num_images, num_labels, num_pairs, sequence_length)
    return sum(parts.values())


def flops_by_part(
    recipe: Recipe,
    num_tokens: float,
    num_images: float,
    num_labels: float | None = None,
    num_pairs: float | None = None,
    sequence_length: int | None = None,
) -> dict[str, float]:
    """`flops_per_step` split into vision, connector, cross_attention, language and head."""
    trained = set(trainable_parts(recipe))
    connector = _CONNECTORS[recipe.model.connector.kind]
    seen = _pairs(recipe, num_tokens, num_pairs, sequence_length)
    decoder = _decoder(recipe, trained, num_tokens, num_images, seen)
    if num_labels is not None:
        decoder["head"] *= num_labels / max(num_tokens, 1)
    if recipe.model.assembly == "language":  # no encoder: nothing has sizes
        return {"vision": 0.0, "connector": 0.0, **decoder}
    return {
        "vision": num_images * _vision(recipe),
        "connector": num_images * connector(recipe, trained),
        **decoder,
    }


def hardware_flops_per_step(
    recipe: Recipe,
    num_tokens: float,
    num_images: float,
    num_labels: float | None = None,
    num_pairs: float | None = None,
    sequence_length: int | None = None,
) -> float:
    """`flops_per_step` and what training.recompute computes again, in the recipe's pipeline layout."""
    model = flops_per_step(recipe, num_tokens, num_images, num_labels, num_pairs, sequence_length)
    return model + sum(recomputed_flops(recipe, num_tokens, num_images, num_pairs, sequence_length).values())


def recomputed_flops(
    recipe: Recipe,
    num_tokens: float,
    num_images: float,
    num_pairs: float | None = None,
    sequence_length: int | None = None,
) -> dict[str, float]:
    """FLOPs of the forward passes that run a second time, by part as in `flops_by_part`."""
    trained, settings = set(trainable_parts(recipe)), recipe.training.recompute
    vision = connector = 0.0
    if settings.vision:
        v, first = recipe.model.vision, max(first_trained(recipe, "vision"), 0)
        num_again = max(range(v.num_layers + 1)[v.feature_layer] - first, 0)
        # of a block's last linear only the input is needed, and there recomputation stops
        last = 2.0 * (v.num_patches + 1) * v.mlp_width * v.width if v.residual == "pre_norm" else 0.0
        vision = num_images * num_again * (_vision_block(recipe, False) - last) if num_again > 0 else 0.0
    if settings.connector and trained & {"vision", "connector"}:
        connector = num_images * (
            _CONNECTORS[recipe.model.connector.kind](recipe, set()) - _last_linear(recipe)
        )
    pairs = _pairs(recipe, num_tokens, num_pairs, sequence_length)
    cross_attention, language = _decoder_again(recipe, trained, num_tokens, num_images, pairs)
    return {
        "vision": vision,
        "connector": connector,
        "cross_attention": cross_attention,
        "language": language,
    }


def _last_linear(recipe: Recipe) -> float:
    """Of the connector: only its input is needed again, and there recomputation stops (where it is
    torch's; megatron's keep their inputs after they ran)."""
    c, hidden = recipe.model.connector, recipe.model.language.hidden_size
    if c.kind == "mlp":
        return 2.0 * recipe.model.vision.num_features * hidden**2
    return 2.0 * c.num_latents * c.num_heads * c.head_dim * hidden if c.kind == "qformer" else 0.0


def recomputed_layers(recipe: Recipe) -> set[int]:
    """The decoder layers (from 0) of which only the inputs are kept, if gradients cross them."""
    settings = recipe.training.recompute
    if settings.language != "full":
        return set()
    chunks = [chunk for stage in stage_layers(recipe) for chunk in stage.chunks]
    return {layer for chunk in chunks for layer in chunk[: settings.layers]}


def layer_gradients(recipe: Recipe) -> list[tuple[bool, bool, bool]]:
    """Of each decoder layer: whether gradients of the hidden states are needed in front of it (and of its
    gated block), behind that block, and behind the layer."""
    model, m, trained = recipe.model, recipe.model.language, set(trainable_parts(recipe))
    first, media = first_trained(recipe, "language"), bool(trained & {"vision", "connector"})
    gradient = first < 0 or _trains_new_tokens(recipe) or (model.assembly == "merged" and media)
    found = []
    for layer in range(m.num_layers):
        before = gradient
        if model.assembly == "cross_attention" and model.cross_attention.stands_before(layer):
            gradient = gradient or media or "cross_attention" in trained
        between = gradient
        gradient = gradient or layer >= first or "lora" in trained
        found.append((before, between, gradient))
    return found


def _decoder_again(
    recipe: Recipe, trained: set[str], num_tokens: float, num_images: float, pairs: float
) -> tuple[float, float]:
    """Recomputed FLOPs of gated blocks and of decoder layers."""
    model, m, settings = recipe.model, recipe.model.language, recipe.training.recompute
    whole, part = recomputed_layers(recipe), 0.0
    if settings.language == "selective":
        part += _attention(pairs, m.hidden_size, False) if "core_attn" in settings.modules else 0.0
        part += (
            _linear(3 * m.hidden_size * m.ffn_hidden_size, False, False) if "mlp" in settings.modules else 0.0
        )
    cross_attention = language = 0.0
    for layer, (_, _, behind) in enumerate(layer_gradients(recipe)):
        if layer in whole and behind:
            language += num_tokens * _decoder_layer(recipe, False, False, False, pairs)
            if model.assembly == "cross_attention" and model.cross_attention.stands_before(layer):
                cross_attention += _gated_block(recipe, set(), False, num_tokens, num_images)
        elif behind:
            language += num_tokens * part
    return cross_attention, language


def _trains_new_tokens(recipe: Recipe) -> bool:
    """Whether embeddings of added tokens are trained in a language model that is frozen otherwise."""
    frozen = "language" in recipe.training.freeze
    return frozen and recipe.training.unfreeze.new_tokens and recipe.model.language.added_vocab > 0


def _pairs(recipe: Recipe, num_tokens: float, num_pairs: float | None, sequence_length: int | None) -> float:
    """Positions that a position attends to, on average."""
    seen = causal_pairs(sequence_length or recipe.data.sequence_length, recipe.model.language.sliding_window)
    if num_pairs is not None and num_tokens:  # of shorter documents; a window leaves out no more of them
        seen = min(seen, num_pairs / num_tokens)
    return seen


def _linear(weights: float, input_gradient: bool, trained: bool) -> float:
    """FLOPs of a linear layer for one position."""
    return 2.0 * weights * (1 + input_gradient + trained)


def _attention(pairs: float, width: float, gradient: bool) -> float:
    """FLOPs of scores and weighted sum over `pairs` of query and key, heads together `width` wide."""
    return 4.0 * pairs * width * (3 if gradient else 1)


def first_trained(recipe: Recipe, part: str) -> float:
    """The first trained block of "vision" or "language": -1 with the embeddings, infinity for none."""
    if part not in recipe.training.freeze:
        return -1
    first = getattr(recipe.training.unfreeze, part)
    return math.inf if first is None else first


def _vision(recipe: Recipe) -> float:
    """One image through the encoder, up to the block whose output is taken."""
    v = recipe.model.vision
    first = first_trained(recipe, "vision")
    total = v.num_patches * _linear(3 * v.patch_size**2 * v.width, False, first < 0)
    num_used_blocks = range(v.num_layers + 1)[v.feature_layer]
    return total + sum(_vision_block(recipe, block >= first) for block in range(num_used_blocks))


def _vision_block(recipe: Recipe, trained: bool) -> float:
    """One image through a block of the encoder."""
    v = recipe.model.vision
    positions, matrices = v.num_patches + 1, 3 if v.activation == "swiglu" else 2
    weights = 4 * v.width**2 + matrices * v.width * v.mlp_width
    return positions * _linear(weights, trained, trained) + _attention(positions**2, v.width, trained)


def _projector(recipe: Recipe, trained: set[str]) -> float:
    """The features of one image through LLaVA's two linear layers."""
    width, hidden = recipe.model.vision.width, recipe.model.language.hidden_size
    own, below = "connector" in trained, "vision" in trained
    layers = _linear(width * hidden, below, own) + _linear(hidden * hidden, below or own, own)
    return recipe.model.vision.num_features * layers


def _resampler(recipe: Recipe, trained: set[str]) -> float:
    """The features of one image through the perceiver resampler."""
    c, width = recipe.model.connector, recipe.model.vision.width
    own, below = "connector" in trained, "vision" in trained
    inner, keys = c.num_heads * c.head_dim, recipe.model.vision.num_features + c.num_latents
    total = 0.0
    for layer in range(c.depth):
        latents_gradient = own or (below and layer > 0)  # the first latents are a parameter
        total += c.num_latents * _linear(width * inner, latents_gradient, own)
        total += keys * _linear(2 * width * inner, own or below, own)
        total += _attention(c.num_latents * keys, inner, own or below)
        weights = inner * width + 2 * c.ffn_multiple * width**2
        total += c.num_latents * _linear(weights, own or below, own)
    return total


def _qformer(recipe: Recipe, trained: set[str]) -> float:
    """The features of one image through the Q-Former and its linear into the language model."""
    c, model = recipe.model.connector, recipe.model
    own, below = "connector" in trained, "vision" in trained
    features, queries, width = model.vision.num_features, c.num_latents, c.num_heads * c.head_dim
    total, gradient = 0.0, own  # of the queries so far: the first are a parameter
    for layer in range(c.depth):
        total += queries * _linear(4 * width**2, gradient, own) + _attention(queries**2, width, gradient)
        if layer % c.cross_every == 0:
            total += queries * _linear(width**2, gradient, own)
            gradient = own or below
            total += features * _linear(2 * model.vision.width * width, gradient, own)
            total += _attention(queries * features, width, gradient)
            total += queries * _linear(width**2, gradient, own)
        total += queries * _linear(2 * c.ffn_multiple * width**2, gradient, own)
    return total + queries * _linear(width * model.language.hidden_size, gradient, own)


def _decoder(
    recipe: Recipe, trained: set[str], num_tokens: float, num_images: float, pairs: float
) -> dict[str, float]:
    """Decoder layers, the gated blocks between them and the output layer, for a batch whose positions attend
    to `pairs` others each."""
    model, m, first = recipe.model, recipe.model.language, first_trained(recipe, "language")
    cross_attention = language = 0.0
    gradients = layer_gradients(recipe)
    for layer, (before, between, _) in enumerate(gradients):
        if model.assembly == "cross_attention" and model.cross_attention.stands_before(layer):
            cross_attention += _gated_block(recipe, trained, before, num_tokens, num_images)
        per_token = _decoder_layer(recipe, between, layer >= first, "lora" in trained, pairs)
        language += num_tokens * per_token
    # the output layer is trained along with the last layers, unless it is a frozen embedding
    own = first < 0 or (first < math.inf and not m.tie_embeddings)
    head = num_tokens * _linear(m.hidden_size * m.vocab_size, gradients[-1][-1], own)
    if not own and _trains_new_tokens(recipe):  # their rows alone
        head += num_tokens * 2.0 * m.hidden_size * m.added_vocab
    return {"cross_attention": cross_attention, "language": language, "head": head}


def _decoder_layer(recipe: Recipe, gradient: bool, own: bool, adapters_trained: bool, pairs: float) -> float:
    """A decoder layer with its adapters, for one position.

    Args:
        gradient: of the hidden states is needed.
        own: the layer's weights are trained.
        adapters_trained: so are its adapters.
        pairs: positions that it attends to.
    """
    m, lora = recipe.model.language, recipe.model.lora
    hidden, ffn, kv_width = m.hidden_size, m.ffn_hidden_size, (m.num_kv_heads or m.num_heads) * m.head_dim
    first = {"q": (hidden, hidden), "k": (hidden, kv_width), "v": (hidden, kv_width)}
    rest = ({"o": (hidden, hidden)}, {"gate": (hidden, ffn), "up": (hidden, ffn)}, {"down": (ffn, hidden)})
    total, gradient = 0.0, gradient or own  # the norm in front of the first linears is trained with them
    for number, linears in enumerate((first, *rest)):
        for width, out in linears.values():
            total += _linear(width * out, gradient, own)
        adapted = [linears[target] for target in lora.targets if lora.rank and target in linears]
        for width, out in adapted:
            total += _linear(lora.rank * width, gradient, adapters_trained)
            total += _linear(lora.rank * out, gradient or adapters_trained, adapters_trained)
        gradient = gradient or (adapters_trained and bool(adapted))
        if number == 0:
            total += _attention(pairs, hidden, gradient)
    return total


def causal_pairs(length: int, window: int | None) -> float:
    """Keys that a position sees on average, counted as half of the square (less with a window)."""
    seen = min(window or length, length)
    return seen - seen**2 / (2 * length)


def _gated_block(
    recipe: Recipe, trained: set[str], text_gradient: bool, num_tokens: float, num_images: float
) -> float:
    """A gated cross-attention block; every position attends to the media tokens of one image."""
    c, m, hidden = recipe.model.cross_attention, recipe.model.language, recipe.model.language.hidden_size
    num_latents, media_width = recipe.model.connector.num_latents, recipe.model.vision.width
    own, media = "cross_attention" in trained, bool(trained & {"vision", "connector"})
    if c.geometry == "idefics":
        inner, feed_forward = hidden, 3 * hidden * m.ffn_hidden_size
    else:
        inner, feed_forward = c.num_heads * c.head_dim, 2 * c.ffn_multiple * hidden**2
    query = _linear(hidden * inner, own or text_gradient, own)
    behind = own or text_gradient or media  # gradients of what the attention gave
    rest = _linear(inner * hidden + feed_forward, behind, own)
    per_token = query + _attention(num_latents, inner, behind) + rest
    keys = num_images * num_latents * _linear(2 * media_width * inner, media, own)
    return num_tokens * per_token + keys


_CONNECTORS = {"mlp": _projector, "resampler": _resampler, "qformer": _qformer}
