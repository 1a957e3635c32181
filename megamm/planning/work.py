"""What one rank computes, moves and sends for a micro-batch, part by part, in the recipe's layout.

A `Work` lists matrix products and attention with the shapes that they have on the rank, the bytes that
memory-bound operators move, and what tensor and context parallelism send. planning/timing.py makes seconds
of it. Whether a gradient is needed decides each of these as it does in planning/flops.py.

Bytes are those of 16-bit tensors: RMSNorm reads and writes once each (with the residual sum: twice), and
three to four times backward; SwiGLU moves 3 and 5 times its width; rotary positions 2 and 2; a gated residual
3 and 3, with the norm behind it 4 and 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megamm.config import Recipe
from megamm.planning.flops import causal_pairs
from megamm.recipe_checks import trainable_parts

ELEMENT = 2  # bytes of an activation and of a weight
FP8_CASTS = 2.0  # bytes written for each operand element: as it is and transposed


@dataclass(frozen=True)
class Gemm:
    """[rows, inputs] times [inputs, outputs], and the products of its backward pass that are needed."""

    rows: float
    inputs: float
    outputs: float
    input_gradient: bool
    weight_gradient: bool
    eight_bit: bool = False


@dataclass(frozen=True)
class Attention:
    """Scores and weighted sum over `pairs` of query and key, heads together `width` wide."""

    pairs: float
    width: float
    gradient: bool


@dataclass
class Work:
    """Attributes: moved_*: bytes of memory-bound operators; sent_*: bytes that reach this rank from the
    others of its tensor- and context-parallel group while it waits; calls_*: collectives; trained: weights
    that this rank has gradients of."""

    gemms: list[Gemm] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    moved_forward: float = 0.0
    moved_backward: float = 0.0
    sent_forward: float = 0.0
    sent_backward: float = 0.0
    calls_forward: int = 0
    calls_backward: int = 0

    def linear(
        self,
        rows: float,
        inputs: float,
        outputs: float,
        gradient: bool,
        trained: bool,
        eight_bit: bool = False,
    ) -> None:
        """A linear layer."""
        self.gemms.append(Gemm(rows, inputs, outputs, gradient, trained, eight_bit))

    def move(self, elements: float, forward: float, backward: float, gradient: bool) -> None:
        """Operators that read and write `elements` so many times."""
        self.moved_forward += ELEMENT * elements * forward
        self.moved_backward += ELEMENT * elements * backward * gradient

    def send(self, size: float, ranks: int, forward: int, backward: int) -> None:
        """So many all-gathers or reduce-scatters of a tensor of `size` elements in all."""
        if ranks > 1:
            share = ELEMENT * size * (ranks - 1) / ranks
            self.sent_forward += forward * share
            self.sent_backward += backward * share
            self.calls_forward += forward
            self.calls_backward += backward

    @property
    def trained(self) -> float:
        """Weights of matrices that this rank trains here."""
        return sum(g.inputs * g.outputs for g in self.gemms if g.weight_gradient)


@dataclass(frozen=True)
class Batch:
    """A micro-batch: `samples` rows of `length` positions with `images` images in all, `labels` positions
    that carry loss."""

    samples: int
    length: int
    images: float
    labels: float


class Workload:
    """The work of a recipe's parts on one rank, for micro-batches like `batch`."""

    def __init__(self, recipe: Recipe, batch: Batch) -> None:
        parallel, m = recipe.parallel, recipe.model.language
        self.recipe, self.batch = recipe, batch
        self.trained = set(trainable_parts(recipe))
        self.tp, self.cp = parallel.tensor, parallel.context
        self.rows = batch.samples * batch.length / self.cp
        self.local_rows = self.rows / (self.tp if parallel.sequence else 1)  # of norms and residuals
        self.pairs = self.rows * causal_pairs(batch.length, m.sliding_window)
        self.eight_bit = recipe.training.fp8.scaling != "off"
        self.kv_width = (m.num_kv_heads or m.num_heads) * m.head_dim
        self.media_rows = math.ceil(batch.images) * recipe.model.connector.num_latents

    def attention(self, gradient: bool, own: bool) -> Work:
        """The attention half of a decoder layer.

        Args:
            gradient: of the hidden states in front of it.
            own: the layer is trained.
        """
        m, work, rows = self.recipe.model.language, Work(), self.rows
        hidden, qkv = m.hidden_size, m.hidden_size + 2 * self.kv_width
        back = gradient or own
        work.move(self.local_rows * hidden, 2, 4, back)  # norm
        work.linear(rows, hidden, qkv / self.tp, back, own, self.eight_bit)
        self._adapters(
            work, {"q": (hidden, hidden), "k": (hidden, self.kv_width), "v": (hidden, self.kv_width)}
        )
        back = back or "lora" in self.trained
        work.move(rows * (hidden + self.kv_width) / self.tp, 2, 2, back)  # rotary positions
        self._core(work, back)
        work.linear(rows, hidden / self.tp, hidden, back, own, self.eight_bit)
        self._adapters(work, {"o": (hidden, hidden)})
        self._gather(work, rows * hidden, back, own)
        if self.cp > 1:
            work.send(rows * self.cp * 2 * self.kv_width / self.tp, self.cp, 1, int(back))
        return work

    def core_attention(self) -> Work:
        """Attention without its linears, forward alone: what recomputing it takes."""
        work = Work()
        self._core(work, True)
        return work

    def mlp(self, gradient: bool, own: bool) -> Work:
        """The feed-forward half of a decoder layer."""
        m, work, rows = self.recipe.model.language, Work(), self.rows
        hidden, ffn, back = m.hidden_size, m.ffn_hidden_size, gradient or own
        work.move(self.local_rows * hidden, 4, 4, back)  # residual sum and norm
        work.linear(rows, hidden, 2 * ffn / self.tp, back, own, self.eight_bit)
        self._adapters(work, {"gate": (hidden, ffn), "up": (hidden, ffn)})
        work.move(rows * ffn / self.tp, 3, 5, back or "lora" in self.trained)  # SwiGLU
        work.linear(rows, ffn / self.tp, hidden, back or "lora" in self.trained, own, self.eight_bit)
        self._adapters(work, {"down": (ffn, hidden)})
        work.move(self.local_rows * hidden, 3, 0, back)  # residual sum
        self._gather(work, rows * hidden, back, own)
        return work

    def gated_block(self, gradient: bool) -> Work:
        """A gated cross-attention block.

        Args:
            gradient: of the hidden states in front of it.
        """
        c, m = self.recipe.model.cross_attention, self.recipe.model.language
        hidden, rows, work, width = m.hidden_size, self.rows, Work(), self.recipe.model.vision.width
        own, media = "cross_attention" in self.trained, bool(self.trained & {"vision", "connector"})
        idefics = c.geometry == "idefics"
        inner = hidden if idefics else c.num_heads * c.head_dim
        ffn = m.ffn_hidden_size if idefics else c.ffn_multiple * hidden
        back, behind = gradient or own, gradient or own or media
        work.move(self.local_rows * hidden, 2, 4, back)  # norm
        work.linear(rows, hidden, inner / self.tp, back, own)
        work.linear(self.media_rows, width, 2 * inner / self.tp, media, own)
        latents = self.recipe.model.connector.num_latents
        work.attentions.append(Attention(rows * latents, inner / self.tp, behind))
        work.move(rows * inner / self.tp, 3, 6, behind)  # of queries and outputs
        work.linear(rows, inner / self.tp, hidden, behind, own)
        work.move(self.local_rows * hidden, 4, 4, behind)  # gate and norm
        work.linear(rows, hidden, (2 if idefics else 1) * ffn / self.tp, behind, own)
        work.move(rows * ffn / self.tp, 3 if idefics else 2, 5 if idefics else 3, behind)
        work.linear(rows, ffn / self.tp, hidden, behind, own)
        work.move(self.local_rows * hidden, 3, 3, behind)  # gate
        for _ in range(2):
            self._gather(work, rows * hidden, behind, own)
        if self.recipe.parallel.sequence:
            work.send(self.media_rows * width, self.tp, 1, int(media))
        return work

    def encoder(self, block_trained: bool) -> Work:
        """A block of the vision encoder; the images are dealt over the tensor-parallel ranks."""
        v, work, own = self.recipe.model.vision, Work(), block_trained
        images = self.images_of_rank
        rows, gated = images * (v.num_patches + 1), v.activation == "swiglu"
        work.linear(rows, v.width, 3 * v.width, own, own)
        work.attentions.append(Attention(images * (v.num_patches + 1) ** 2, v.width, own))
        work.linear(rows, v.width, v.width, own, own)
        work.linear(rows, v.width, (2 if gated else 1) * v.mlp_width, own, own)
        work.linear(rows, v.mlp_width, v.width, own, own)
        work.move(
            rows * v.width, 2 * 2 + 2 * 3 + 4, 2 * 4 + 6, own
        )  # norms, residual sums, heads to the front
        work.move(rows * v.mlp_width, {"gelu": 2, "quick_gelu": 7, "swiglu": 3}[v.activation], 6, own)
        return work

    @property
    def images_of_rank(self) -> int:
        """Images that this rank encodes: at least one, so that all ranks take part."""
        return max(1, math.ceil(math.ceil(self.batch.images) / self.tp))

    def first(self) -> Work:
        """Patches, features to all ranks, connector, embeddings and their merging."""
        model, work = self.recipe.model, Work()
        v, hidden, language = model.vision, model.language.hidden_size, self.trained & {"language"}
        work.move(self.rows * self.cp * hidden, 2, 2, bool(language))
        if model.assembly == "language":
            return work
        own, below = "connector" in self.trained, "vision" in self.trained
        images = max(1, math.ceil(self.batch.images))
        whole_vision = "vision" not in self.recipe.training.freeze
        work.linear(self.images_of_rank * v.num_patches, 3 * v.patch_size**2, v.width, False, whole_vision)
        work.send(images * v.num_features * v.width, self.tp, 1, 0)
        connect = {"mlp": self._projector, "resampler": self._resampler, "qformer": self._qformer}
        connect[model.connector.kind](work, images, own, below)
        if model.assembly == "merged":
            work.move(self.rows * self.cp * hidden, 5, 5, own or below or bool(language))
        return work

    def last(self, gradient: bool, own: bool) -> Work:
        """The final norm, the output layer and the loss at the positions that carry it."""
        m, work, rows = self.recipe.model.language, Work(), self.batch.labels / self.cp
        vocabulary = math.ceil(m.vocab_size / self.tp)
        work.move(self.local_rows * m.hidden_size, 2, 4, gradient or own)
        work.linear(rows, m.hidden_size, vocabulary, gradient, own)
        work.move(rows * vocabulary, 1, 2, gradient or own)  # cross entropy, its gradient in place
        # hidden states to all ranks, and the sum of their gradients
        work.send(self.rows * m.hidden_size, self.tp, 1, (2 - self.recipe.parallel.sequence) * int(gradient))
        return work

    def _core(self, work: Work, gradient: bool) -> None:
        hidden = self.recipe.model.language.hidden_size
        work.attentions.append(Attention(self.pairs, hidden / self.tp, gradient))
        work.move(self.rows * (2 * hidden + 2 * self.kv_width) / self.tp, 1, 2.5, gradient)

    def _gather(self, work: Work, size: float, gradient: bool, own: bool) -> None:
        """Around a column-parallel linear and a row-parallel one: an all-gather and a reduce-scatter, or the
        all-reduce that takes as long. Backward, what goes with the column-parallel linear runs beside the
        gradient of its weight, if that is needed."""
        work.send(size, self.tp, 2, (1 if own else 2) * int(gradient))

    def _adapters(self, work: Work, linears: dict[str, tuple[int, int]]) -> None:
        lora, own = self.recipe.model.lora, "lora" in self.trained
        for target, (inputs, outputs) in linears.items():
            if lora.rank and target in lora.targets:
                work.linear(self.rows, inputs, lora.rank, True, own)
                work.linear(self.rows, lora.rank, outputs / self.tp, True, own)
                work.move(self.rows * outputs / self.tp, 3, 1, True)

    def _projector(self, work: Work, images: int, own: bool, below: bool) -> None:
        v, hidden = self.recipe.model.vision, self.recipe.model.language.hidden_size
        rows = images * v.num_features
        work.linear(rows, v.width, hidden, below, own)
        work.move(rows * hidden, 2, 3, own or below)
        work.linear(rows, hidden, hidden, own or below, own)

    def _resampler(self, work: Work, images: int, own: bool, below: bool) -> None:
        v, c, tp = self.recipe.model.vision, self.recipe.model.connector, self.tp
        inner, back = c.num_heads * c.head_dim, own or below
        queries = images * c.num_latents
        keys = images * (v.num_features + c.num_latents)
        for _ in range(c.depth):
            work.move(keys * v.width, 4, 6, back)  # norms and joining
            work.linear(queries, v.width, inner / tp, back, own)
            work.linear(keys, v.width, 2 * inner / tp, back, own)
            pairs = queries * (v.num_features + c.num_latents)
            work.attentions.append(Attention(pairs, inner / tp, back))
            work.linear(queries, inner / tp, v.width, back, own)
            work.linear(queries, v.width, c.ffn_multiple * v.width / tp, back, own)
            work.linear(queries, c.ffn_multiple * v.width / tp, v.width, back, own)
            work.move(queries * v.width * (8 + 2 * c.ffn_multiple / tp), 1, 1, back)
            work.send(queries * v.width, tp, 4, 4 * int(back))

    def _qformer(self, work: Work, images: int, own: bool, below: bool) -> None:
        v, c, tp = self.recipe.model.vision, self.recipe.model.connector, self.tp
        width, back = c.num_heads * c.head_dim, own or below
        queries, keys = images * c.num_latents, images * v.num_features
        for layer in range(c.depth):
            work.linear(queries, width, 3 * width / tp, back, own)
            work.attentions.append(Attention(queries * c.num_latents, width / tp, back))
            work.linear(queries, width / tp, width, back, own)
            if layer % c.cross_every == 0:
                work.linear(queries, width, width / tp, back, own)
                work.linear(keys, v.width, 2 * width / tp, back, own)
                work.attentions.append(Attention(queries * v.num_features, width / tp, back))
                work.linear(queries, width / tp, width, back, own)
                work.send(queries * width, tp, 2, 2 * int(back))
            work.linear(queries, width, c.ffn_multiple * width / tp, back, own)
            work.linear(queries, c.ffn_multiple * width / tp, width, back, own)
            work.move(queries * width * (14 + 2 * c.ffn_multiple / tp), 1, 1, back)
            work.send(queries * width, tp, 4, 4 * int(back))
        work.linear(queries, width, self.recipe.model.language.hidden_size, back, own)
