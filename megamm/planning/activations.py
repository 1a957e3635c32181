"""What decoder layers keep for the backward pass, in bytes, from the recipe alone.

Counted is what our own layers and operators save, tensor by tensor (the tests compare it with what the
allocator of a CPU gives out): a norm keeps its input; a linear its input only if its weight is trained;
rotary positions keep nothing; attention keeps queries, keys, values, its output and a number for each head
and position; SwiGLU keeps its input. Below the first trained weight nothing is kept at all.

Two things differ between the layers on the CPU (backend "local") and those of Transformer Engine, of which
only the first are measured. Assumed of the second: its attention is a flash-attention kernel that keeps the
same tensors, and keys and values of a rank's own part of the sequence under context parallelism (where ours
gather them); with FP8, the inputs of linears are kept in 8 bits.

Shapes: n positions of a rank, H hidden size, F feed-forward width, T tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megamm.config import Recipe
from megamm.planning.gradients import GradientFlow
from megamm.planning.tensors import kv_width


@dataclass(frozen=True)
class Positions:
    """Positions of a micro-batch on one rank.

    Attributes:
        rows: B.
        whole: n, of this rank's part of the sequence under context parallelism.
        shard: of these, the rank's part under sequence parallelism.
    """

    rows: int
    whole: int
    shard: int

    @classmethod
    def of(cls, recipe: Recipe) -> Positions:
        parallel, rows = recipe.parallel, recipe.training.micro_batch_size
        whole = rows * max(recipe.data.sequence_lengths()) // parallel.context
        shards = parallel.tensor if parallel.sequence else 1
        return cls(1 if recipe.data.pack else rows, whole, whole // shards)


def element_size(recipe: Recipe) -> int:
    """Bytes of a number of the activations."""
    return 4 if recipe.training.precision == "fp32" else 2


def is_local(recipe: Recipe) -> bool:
    """Whether the layers are those of the backend "local"."""
    return recipe.parallel.backend == "local" or recipe.training.device == "cpu"


@dataclass(frozen=True)
class LayerBytes:
    """A decoder layer with the gated block in front of it.

    Attributes:
        kept: from the forward to the backward pass.
        again: made again in the backward pass, on top.
        working: what the backward pass takes while it runs, on top of both.
    """

    kept: int
    again: int
    working: int


class DecoderMemory:
    """Bytes of the decoder layers of a recipe; one object for all layers of a rank."""

    def __init__(self, recipe: Recipe, media_tokens: int) -> None:
        """
        Args:
            media_tokens: M x B of a micro-batch, as the gated blocks see them.
        """
        self.recipe, self.flow = recipe, GradientFlow.of(recipe)
        self.n, self.media_tokens = Positions.of(recipe), media_tokens
        self.element, self.tensor = element_size(recipe), recipe.parallel.tensor
        self.hidden = recipe.model.language.hidden_size
        fp8 = recipe.training.fp8.scaling != "off"
        self.linear_element = 1 if fp8 else self.element  # of what a linear keeps
        self._known: dict[tuple[bool, bool, bool, bool], LayerBytes] = {}

    @property
    def hidden_states(self) -> int:
        """Bytes of hidden states as layers hand them on."""
        return self.n.shard * self.hidden * self.element

    def layer(self, layer: int, place: int) -> LayerBytes:
        """Of decoder layer `layer` (from 0), the `place`-th of its chunk."""
        flow, recompute = self.flow, self.recipe.training.recompute
        model = self.recipe.model
        is_gated = model.assembly == "cross_attention" and model.cross_attention.stands_before(layer)
        limit = recompute.layers if recompute.layers is not None else place + 1
        is_recomputed = recompute.language == "full" and place < limit
        key = (flow.reaches(layer), layer >= flow.first_layer, is_gated, is_recomputed)
        if key not in self._known:
            self._known[key] = self._layer(*key)
        return self._known[key]

    def _layer(self, gradient: bool, own: bool, is_gated: bool, is_recomputed: bool) -> LayerBytes:
        kept = 0
        if is_gated:
            kept = self._gated_block(gradient)
            gradient = gradient or self.flow.gated or self.flow.media
        layer = self._decoder_layer(gradient, own)
        kept, again = kept + layer.kept, layer.again
        if is_recomputed:
            everything = kept + again
            kept = min(self.hidden_states, everything)
            again = everything - kept
        return LayerBytes(kept, again, layer.working)

    # --- the language model's layer ---------------------------------------------------------------------

    def _decoder_layer(self, gradient: bool, own: bool) -> LayerBytes:
        m, recompute = self.recipe.model.language, self.recipe.training.recompute
        modules = recompute.modules if recompute.language == "selective" else ()
        n, e, hidden = self.n, self.element, self.hidden
        ffn = n.whole * m.ffn_hidden_size // self.tensor
        kept = again = 0
        # 1. norm and qkv
        if gradient or own:
            kept += self.hidden_states
        kept += self._linear_input(n.shard * hidden, own, ("q", "k", "v"))
        gradient = gradient or own or self._has_adapters(("q", "k", "v"))
        # 2. attention, and its output as what the next linear takes
        attended = n.whole * hidden // self.tensor
        if gradient:
            own_keys = self.recipe.parallel.context if is_local(self.recipe) else 1
            kept += e * (attended + own_keys * 2 * n.whole * kv_width(m) // self.tensor)
            results = e * attended + 4 * n.whole * m.num_heads // self.tensor
            if "core_attn" in modules:
                again += results
            else:
                kept += results
        is_copied = self._attention_copies() or "core_attn" in modules or not gradient
        kept += self._linear_input(attended, own, ("o",), is_copied)
        gradient = gradient or self._has_adapters(("o",))
        # 3. residual, norm and the first linear of the feed-forward
        if gradient:
            kept += self.hidden_states
        mlp_input = self._linear_input(n.shard * hidden, own, ("gate", "up"))
        # 4. SwiGLU and the second linear
        inner_gradient = gradient or self._has_adapters(("gate", "up"))
        mlp = 2 * ffn * e if inner_gradient else 0
        mlp += self._linear_input(ffn, own, ("down",))
        if "mlp" in modules and inner_gradient:
            kept += n.shard * hidden * e  # the input, from which all is made again
            again += mlp + max(0, mlp_input - n.shard * hidden * e)
        else:
            kept += mlp_input + mlp
        behind = inner_gradient or self._has_adapters(("down",))
        return LayerBytes(kept, again, self._mlp_backward(own) if behind else 0)

    def _mlp_backward(self, own: bool) -> int:
        """The most that the backward pass of the feed-forward takes at a time; it is the first of a layer,
        when all that was kept is still there."""
        m, n, e = self.recipe.model.language, self.n, self.element
        inner = n.whole * m.ffn_hidden_size // self.tensor * e
        whole = n.whole * self.hidden * e
        weight = m.ffn_hidden_size * self.hidden // self.tensor * e if own else 0
        gathered = whole if self.recipe.parallel.sequence else 0
        freed = inner if own else 0  # the second linear's input, once its weight has its gradient
        second = gathered + inner + weight
        swiglu = 3 * inner - freed
        first = 2 * inner - 2 * inner - freed + whole + 2 * weight
        return self.hidden_states + max(second, swiglu, first)

    def _attention_copies(self) -> bool:
        """Whether the attention's output is copied on its way to the next linear: [B, S] becomes [S, B], or
        pieces are put together."""
        if is_local(self.recipe):  # whose output has the layout of the queries
            return self.recipe.data.pack or self.recipe.parallel.context > 1
        return self.n.rows > 1

    def _has_adapters(self, targets: Collection[str]) -> bool:
        """Whether any of these linears has adapters that are trained."""
        lora = self.recipe.model.lora
        return self.flow.adapters and any(target in lora.targets for target in targets)

    def _linear_input(self, size: int, own: bool, targets: Collection[str], is_copied: bool = True) -> int:
        """What a fused linear and its adapters keep of `size` numbers of input.

        Args:
            own: its weight is trained.
            targets: what it computes.
            is_copied: the input is memory of its own; otherwise something else keeps it anyway.
        """
        lora = self.recipe.model.lora
        adapted = [target for target in targets if lora.rank and target in lora.targets]
        kept = size * self.linear_element if own and is_copied else 0
        if adapted and self.flow.adapters:
            if lora.dropout:  # the input with gaps, and where they are
                kept += size * (self.element + 1)
            elif not own and is_copied:
                kept += size * self.element
            kept += self.n.whole * lora.rank * len(adapted) * self.element
        return kept

    # --- the gated block --------------------------------------------------------------------------------

    def _gated_block(self, gradient: bool) -> int:
        """What a gated block keeps, the media tokens apart, which all blocks have in common."""
        c, m, own = self.recipe.model.cross_attention, self.recipe.model.language, self.flow.gated
        n, e, hidden = self.n, self.element, self.hidden_states
        is_idefics = c.geometry == "idefics"
        inner = self.hidden if is_idefics else c.num_heads * c.head_dim
        heads = m.num_heads if is_idefics else c.num_heads
        queries = n.whole * inner // self.tensor * e
        keys = self.media_tokens * inner // self.tensor * e
        kept = hidden * (gradient or own) + self._block_input(n.shard * self.hidden)
        if gradient or own or self.flow.media:
            kept += 2 * queries + 2 * keys + 4 * n.whole * heads // self.tensor
            if c.qk_norm:  # as they were before the norms
                kept += queries + keys
            if own and (is_local(self.recipe) or n.rows > 1):  # the output, put together
                kept += queries
            kept += hidden  # the sum, which is normed
            ffn = m.ffn_hidden_size if is_idefics else c.ffn_multiple * self.hidden
            ffn = n.whole * ffn // self.tensor
            kept += (2 if is_idefics else 1) * ffn * e + self._block_input(ffn)
            kept += self._block_input(n.shard * self.hidden)
            kept += 2 * hidden * own  # both branches, for their gates
        return kept

    def _block_input(self, size: int) -> int:
        return size * self.linear_element if self.flow.gated else 0
