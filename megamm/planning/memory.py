"""The memory of a rank at the fullest moment of a step, by formulas: no model is built, no torch is
imported."""

from __future__ import annotations

from dataclasses import dataclass

from megamm.config import Recipe
from megamm.config.parts import padded_vocab_size
from megamm.planning.activations import DecoderMemory, element_size
from megamm.planning.image_activations import ImageBytes, image_bytes, images_of_micro_batch, media_tokens
from megamm.planning.in_flight import micro_batches, most_in_flight
from megamm.planning.layout import StageContents, stage_layers
from megamm.planning.parameters import held_bytes
from megamm.planning.tensors import trains_embedding

# Bytes of logits that exist at a time (ops.linear_cross_entropy).
_LOGIT_BYTES = {"cpu": 2**27, "cuda": 2**28}
# On a GPU, outside of what torch gives out: the CUDA context with the kernels of torch, cuBLAS and its
# workspaces; each communicator of NCCL with its channels. And what the caching allocator holds in pieces that
# nobody can use, as a share of what comes and goes. These three are round numbers from experience, not
# measured here.
_CONTEXT_BYTES = 2**29
_COMMUNICATOR_BYTES = 2**28
_FRAGMENTED = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a pipeline stage, at the fullest moment of a step.

    Attributes:
        weights: of all its parameters, in the precision of the recipe.
        gradients: fp32 buffers of the trained ones.
        optimizer: fp32 weights and moments, the rank's share of them.
        activations: what decoder layers keep for the backward pass, of all micro-batches in flight.
        vision_features: what encoder and connector keep likewise: features, and what lies between.
        logits: what the loss takes: logits of a chunk of positions, gradients of hidden states and of the
            output layer.
        working: what else exists at that moment: a layer that is computed again, gradients on their way.
        buffers: of communication.
        pictures: of all micro-batches of the step.
        allowance: outside of tensors: CUDA context, NCCL, fragmentation; assumed. 0 on the CPU.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    vision_features: int
    logits: int
    working: int
    buffers: int
    pictures: int
    allowance: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    @property
    def of_step(self) -> int:
        """What comes and goes with a step."""
        return self.activations + self.vision_features + self.logits + self.working


def memory_of_stage(recipe: Recipe, world: int, stage: int, images: int | None = None) -> Memory:
    """The memory of each rank of a pipeline stage.

    Every position is taken to carry a label (those without save logits), and micro-batches to be as long as
    the longest rows of the recipe.

    Args:
        recipe: validated, for `world` processes.
        world: processes of the run.
        stage: pipeline rank.
        images: in a micro-batch; None: as many as it may hold.
    """
    parallel = recipe.parallel
    contents = stage_layers(recipe)[stage]
    images = images_of_micro_batch(recipe) if images is None else images
    step = _Step(recipe, contents, images)
    counts = most_in_flight(recipe, world, stage, step.chunk_bytes)
    held = held_bytes(recipe, world, stage)
    activations = sum(count * size for count, size in zip(counts, step.decoder_bytes, strict=True))
    vision = counts[0] * step.image_bytes
    logits = step.loss()
    more = max(0, step.working() - logits)
    pictures = _pictures(recipe, world, contents, images)
    allowance = 0
    if recipe.training.device != "cpu":
        groups = sum(size > 1 for size in (parallel.tensor, parallel.pipeline, parallel.context))
        groups += world > parallel.tensor * parallel.pipeline
        comes_and_goes = activations + vision + logits + more
        allowance = _CONTEXT_BYTES + _COMMUNICATOR_BYTES * groups + int(_FRAGMENTED * comes_and_goes)
    return Memory(
        weights=held.weights,
        gradients=held.gradients,
        optimizer=held.optimizer,
        activations=activations,
        vision_features=vision,
        logits=logits,
        working=more,
        buffers=_communication(recipe, step),
        pictures=pictures,
        allowance=allowance,
    )


def largest_stage(recipe: Recipe, world: int, images: int | None = None) -> tuple[int, Memory]:
    """The pipeline stage whose ranks need most, and how much; `images` as in `memory_of_stage`."""
    found = [memory_of_stage(recipe, world, stage, images) for stage in range(recipe.parallel.pipeline)]
    largest = max(range(len(found)), key=lambda stage: found[stage].total)
    return largest, found[largest]


class _Step:
    """A micro-batch in the chunks of one rank."""

    def __init__(self, recipe: Recipe, contents: StageContents, images: int) -> None:
        self.recipe, self.contents = recipe, contents
        tokens = media_tokens(recipe, images)
        self.decoder = DecoderMemory(recipe, tokens)
        self.element = element_size(recipe)
        shards = recipe.parallel.tensor if recipe.parallel.sequence else 1
        self.media = tokens // shards * recipe.model.vision.width * self.element
        self.images: ImageBytes | None = None
        if contents.holds_embedding and recipe.model.assembly != "language":
            self.images = image_bytes(recipe, images)
        self.layers = [
            [self.decoder.layer(layer, place) for place, layer in enumerate(chunk)]
            for chunk in contents.chunks
        ]

    @property
    def image_bytes(self) -> int:
        """What encoder and connector keep."""
        return self.images.kept if self.images else 0

    @property
    def decoder_bytes(self) -> list[int]:
        """What each chunk keeps: what it received, and what its layers keep."""
        return [self._chunk(number) for number in range(len(self.layers))]

    @property
    def chunk_bytes(self) -> list[int]:
        """The same, with the images."""
        first, *rest = self.decoder_bytes
        return [first + self.image_bytes, *rest]

    def _chunk(self, number: int) -> int:
        kept = sum(layer.kept for layer in self.layers[number])
        chunks = len(self.layers)
        if chunks > 1 and not (self.contents.holds_output and number == chunks - 1):
            kept += self.decoder.hidden_states + self.media  # what was sent on, which this schedule holds
        if self.contents.holds_embedding and number == 0:
            return kept + (self.media if self.decoder.flow.gated else 0)
        # the schedule holds what came from the stage before; the first layer's input is the same memory
        received = self.decoder.hidden_states + self.media
        first = self.contents.chunks[number]
        if first and (self.decoder.flow.reaches(first[0]) or first[0] >= self.decoder.flow.first_layer):
            received -= self.decoder.hidden_states
        return kept + received

    def loss(self) -> int:
        """Bytes at the moment when the loss of a chunk of positions is computed."""
        if not self.contents.holds_output:
            return 0
        m, parallel, n, e = self.recipe.model.language, self.recipe.parallel, self.decoder.n, self.element
        flow, hidden = self.decoder.flow, self.decoder.hidden_states
        columns = padded_vocab_size(m.vocab_size, parallel.tensor) // parallel.tensor
        gradient = flow.reaches(m.num_layers) or flow.first_layer < float("inf")
        whole = n.whole * m.hidden_size * e
        # before and behind the last norm; under sequence parallelism, gathered as well
        found = hidden * (1 + gradient) + (whole if parallel.sequence else 0)
        found += whole * gradient
        found += self._embedded()
        limit = _LOGIT_BYTES["cpu" if self.recipe.training.device == "cpu" else "cuda"]
        rows = max(1, limit // (columns * e))
        chunks = -(-n.whole // rows)
        found += -(-n.whole // chunks) * columns * e
        if flow.output:
            weight = columns * m.hidden_size
            found += weight * (4 if chunks > 1 else e)
            if chunks > 1 and e == 2 and self.recipe.training.device == "cpu":
                found += weight * (2 + 4)  # a product, as it is and in fp32; a GPU adds as it multiplies
        return found

    def _embedded(self) -> int:
        """What a forward pass that goes from the embedding to the loss still holds of its beginning."""
        if not self.contents.holds_embedding:
            return 0
        flow, decoder = self.decoder.flow, self.decoder
        found = 0 if flow.reaches(0) or flow.first_layer <= 0 else decoder.hidden_states
        if self.recipe.model.assembly == "merged":  # the sequence with the images, before it is dealt
            found += decoder.n.whole * self.recipe.parallel.context * decoder.hidden * self.element
        return found

    def working(self) -> int:
        """The most that exists beyond what is kept, apart from the loss."""
        found = [0]
        for layers in self.layers:
            gone = 0  # what the layers above have freed
            for layer in reversed(layers):
                found.append(layer.again + layer.working - gone)
                gone += layer.kept
        decoder = self._chunk(0)
        if self.images is not None:
            found.append(self.images.working - decoder)
            if trains_embedding(self.recipe):
                m, tensor = self.recipe.model.language, self.recipe.parallel.tensor
                table = padded_vocab_size(m.vocab_size, tensor) // tensor * m.hidden_size
                found.append(table * self.element - decoder)
        return max(found)


def _communication(recipe: Recipe, step: _Step) -> int:
    """Buffers of tensor and pipeline parallelism."""
    found = 0
    if recipe.parallel.sequence:  # the gathered input of linears, in memory that is kept
        found += step.decoder.n.whole * step.decoder.hidden * step.element
    if recipe.parallel.pipeline > 1:  # what is on its way to the next stage and back from it
        found += 2 * (step.decoder.hidden_states + step.media)
    return found


def _pictures(recipe: Recipe, world: int, contents: StageContents, images: int) -> int:
    """Pictures of all micro-batches of a step, which come to the first stage together, in fp32."""
    if not contents.holds_embedding:
        return 0
    return 4 * 3 * recipe.model.vision.image_size**2 * images * micro_batches(recipe, world)
