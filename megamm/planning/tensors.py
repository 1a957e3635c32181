"""The parameters of one rank, from the recipe alone: how many elements each has, in the order in which the
model names them. No model is built: a search over layouts asks for thousands of ranks.

Everything here repeats, in numbers, what models/, layers/ and megatron-core allocate; tests/planning compares
it with models that are built. Shapes: H hidden size, F feed-forward width, W vision width, T tensor-parallel
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megamm.config import ConnectorConfig, LanguageConfig, Recipe, VisionConfig
from megamm.config.parts import padded_vocab_size
from megamm.planning.layout import stage_layers


class Tensor(NamedTuple):
    """A parameter, or a rank's shard of it.

    Attributes:
        part: as in training.freeze.
        size: elements.
        trained: has a gradient.
        in_fp8: a weight of a decoder linear, which training.fp8 may keep in 8 bits.
        shared: an embedding that the first and the last pipeline stage have both.
    """

    part: str
    size: int
    trained: bool
    in_fp8: bool = False
    shared: bool = False


def rank_tensors(recipe: Recipe, stage: int) -> list[list[Tensor]]:
    """The parameters of each model chunk of a pipeline rank; every tensor rank of the stage has the same."""
    contents = stage_layers(recipe)[stage]
    last = len(contents.chunks) - 1
    chunks = []
    for number, layers in enumerate(contents.chunks):
        first, output = contents.holds_embedding and number == 0, contents.holds_output and number == last
        found: list[Tensor] = []
        if first and recipe.model.assembly != "language":
            found += _vision(recipe)
            found += _connector(recipe)
        found += _language(recipe, layers, first, output)
        chunks.append(found)
    return chunks


# --- encoder --------------------------------------------------------------------------------------------


def used_blocks(vision: VisionConfig) -> int:
    """How many of the encoder's blocks are run."""
    return range(vision.num_layers + 1)[vision.feature_layer]


def _vision(recipe: Recipe) -> Iterator[Tensor]:
    v, training = recipe.model.vision, recipe.training
    whole = "vision" not in training.freeze
    first = training.unfreeze.vision
    used = used_blocks(v)
    embeddings = [v.width, (1 + v.num_patches) * v.width, 3 * v.patch_size**2 * v.width]
    embeddings += [v.width] * v.patch_bias + [v.width, v.width] * v.pre_norm
    yield from (Tensor("vision", size, whole) for size in embeddings)
    block = _vision_block(v)
    for number in range(v.num_layers):
        trained = number < used and (whole or (first is not None and number >= first))
        yield from (Tensor("vision", size, trained) for size in block)
    if v.post_norm:
        trained = v.feature_norm and (whole or first is not None)
        yield from (Tensor("vision", v.width, trained) for _ in range(2))


def _vision_block(v: VisionConfig) -> list[int]:
    w, inner = v.width, (2 if v.activation == "swiglu" else 1) * v.mlp_width
    norm = [w, w]
    qkv = [3 * w * w, 3 * w] if v.qkv_bias == "all" else [w, w, 3 * w * w]
    attention = qkv + norm * v.sub_norm + [w * w, w]
    mlp = [w * inner, inner, *[v.mlp_width, v.mlp_width] * v.sub_norm, w * v.mlp_width, w]
    return [*norm, *attention, *norm, *mlp]


# --- connector ------------------------------------------------------------------------------------------


def _connector(recipe: Recipe) -> Iterator[Tensor]:
    c, width, hidden = recipe.model.connector, recipe.model.vision.width, recipe.model.language.hidden_size
    trained = "connector" not in recipe.training.freeze
    flags: list[int] = []
    if c.kind == "mlp":
        sizes = [width * hidden, hidden, hidden * hidden, hidden]
    elif c.kind == "resampler":
        sizes = _resampler(c, width, recipe.parallel.tensor)
    else:
        flags = [hidden, hidden] * c.flag_embeddings
        sizes = _qformer(c, width, hidden, recipe.parallel.tensor)
    # the flags come behind the latents, and are never trained
    yield from (Tensor("connector", size, trained) for size in sizes[:1])
    yield from (Tensor("connector", size, False) for size in flags)
    yield from (Tensor("connector", size, trained) for size in sizes[1:])


def _resampler(c: ConnectorConfig, width: int, tensor: int) -> list[int]:
    norm, inner = [width, width], c.num_heads * c.head_dim
    head_norms = [c.head_dim] * 4 if c.qk_norm else []
    attention = [*_attention(width, width, inner, tensor, False), *head_norms]
    feed_forward = [width * c.ffn_multiple * width // tensor] * 2
    layer = [*norm, *norm, *attention, *norm, *feed_forward]
    return [c.num_latents * width, *layer * c.depth, *norm]


def _qformer(c: ConnectorConfig, vision_width: int, hidden: int, tensor: int) -> list[int]:
    width = c.num_heads * c.head_dim
    norm, inner = [width, width], c.ffn_multiple * width
    own = [*_attention(width, width, width, tensor, True), *norm]
    cross = [*_attention(width, vision_width, width, tensor, True), *norm]
    matrix = width * inner // tensor
    rest = [matrix, inner // tensor, matrix, width, *norm]
    layers = [size for n in range(c.depth) for size in own + cross * (n % c.cross_every == 0) + rest]
    start = [c.num_latents * width, vision_width, vision_width, *norm]
    return [*start, *layers, width * hidden, hidden]


def _attention(query: int, context: int, inner: int, tensor: int, bias: bool) -> list[int]:
    """to_q, to_kv and to_out; the bias of to_out is whole on every rank."""
    weights = [inner * query // tensor, 2 * inner * context // tensor, query * inner // tensor]
    if not bias:
        return weights
    biases = [inner // tensor, 2 * inner // tensor, query]
    return [size for pair in zip(weights, biases, strict=True) for size in pair]


# --- decoder --------------------------------------------------------------------------------------------


def first_trained_layer(recipe: Recipe) -> float:
    """The first decoder layer whose own weights are trained; infinity for none, -1 with the embedding."""
    if "language" not in recipe.training.freeze:
        return -1
    first = recipe.training.unfreeze.language
    return float("inf") if first is None else first


def trains_output_layer(recipe: Recipe) -> bool:
    """Whether the matrix that makes the logits has a gradient."""
    first = first_trained_layer(recipe)
    tied = recipe.model.language.tie_embeddings
    return first == -1 or (first < float("inf") and not tied) or recipe.training.unfreeze.new_tokens


def trains_embedding(recipe: Recipe) -> bool:
    """Whether the embedding has a gradient (that of new tokens alone is as large as that of all)."""
    return first_trained_layer(recipe) == -1 or recipe.training.unfreeze.new_tokens


def _language(recipe: Recipe, layers: range, first: bool, output: bool) -> Iterator[Tensor]:
    m, parallel = recipe.model.language, recipe.parallel
    table = padded_vocab_size(m.vocab_size, parallel.tensor) * m.hidden_size // parallel.tensor
    start = first_trained_layer(recipe)
    shared = m.tie_embeddings and parallel.pipeline > 1
    if first:
        yield Tensor("language", table, trains_embedding(recipe), shared=shared)
    layer_of = {trained: _decoder_layer(recipe, trained) for trained in (False, True)}
    cross = recipe.model.cross_attention if recipe.model.assembly == "cross_attention" else None
    block = _gated_block(recipe) if cross else []
    for layer in layers:
        yield from layer_of[layer >= start]
        if cross and cross.stands_before(layer):
            yield from block
    if output:
        yield Tensor("language", m.hidden_size, start < float("inf"))
        if not (m.tie_embeddings and first):
            yield Tensor("language", table, trains_output_layer(recipe), shared=shared)


def _decoder_layer(recipe: Recipe, trained: bool) -> list[Tensor]:
    m, tensor = recipe.model.language, recipe.parallel.tensor
    hidden, ffn, kv = m.hidden_size, m.ffn_hidden_size, (m.num_kv_heads or m.num_heads) * m.head_dim

    def weight(size: int) -> Tensor:
        return Tensor("language", size // tensor, trained, in_fp8=True)

    def vector(size: int) -> Tensor:
        return Tensor("language", size, trained)

    def bias(present: bool, size: int) -> list[Tensor]:
        return [vector(size)] if present else []

    qkv = hidden + 2 * kv
    return [
        vector(hidden),
        weight(hidden * hidden),
        *bias(m.out_bias, hidden),
        *_adapters(recipe, {"o": (hidden, hidden)}, by_output=False),
        weight(qkv * hidden),
        *bias(m.qkv_bias, qkv // tensor),
        *_adapters(recipe, {"q": (hidden, hidden), "k": (hidden, kv), "v": (hidden, kv)}, by_output=True),
        vector(hidden),
        weight(2 * ffn * hidden),
        *_adapters(recipe, {"gate": (hidden, ffn), "up": (hidden, ffn)}, by_output=True),
        weight(hidden * ffn),
        *_adapters(recipe, {"down": (ffn, hidden)}, by_output=False),
    ]


def _adapters(recipe: Recipe, linears: dict[str, tuple[int, int]], by_output: bool) -> Iterator[Tensor]:
    """A and B of the adapters of a fused linear, (inputs, outputs) of each: B is split where the linear is
    split by outputs, else A."""
    lora, tensor = recipe.model.lora, recipe.parallel.tensor
    trained = "lora" not in recipe.training.freeze
    for target, (inputs, outputs) in linears.items():
        if lora.rank and target in lora.targets:
            yield Tensor("lora", lora.rank * (inputs if by_output else inputs // tensor), trained)
            yield Tensor("lora", lora.rank * (outputs // tensor if by_output else outputs), trained)


def _gated_block(recipe: Recipe) -> list[Tensor]:
    m, c, tensor = recipe.model.language, recipe.model.cross_attention, recipe.parallel.tensor
    hidden, width = m.hidden_size, recipe.model.vision.width
    gate = hidden if c.vector_gates else 1
    if c.geometry == "idefics":
        norm = [hidden]
        attention = _attention(hidden, width, hidden, tensor, False) + [m.head_dim] * (2 * c.qk_norm)
        feed_forward = [2 * m.ffn_hidden_size * hidden // tensor, m.ffn_hidden_size * hidden // tensor]
    else:
        norm = [hidden, hidden]
        attention = _attention(hidden, width, c.num_heads * c.head_dim, tensor, False)
        feed_forward = [c.ffn_multiple * hidden * hidden // tensor] * 2
    trained = "cross_attention" not in recipe.training.freeze
    matrices = {*attention[:3], *feed_forward}
    sizes = [gate, gate, *norm, *attention, *norm, *feed_forward]
    return [Tensor("cross_attention", size, trained, in_fp8=size in matrices) for size in sizes]


def kv_width(language: LanguageConfig) -> int:
    """Width of all keys of a position."""
    return (language.num_kv_heads or language.num_heads) * language.head_dim
