"""What the parts of a model cost in seconds, for one micro-batch: what pipeline stages are made of."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

from megamm.config import Recipe
from megamm.planning.flops import first_trained, layer_gradients
from megamm.planning.hardware import Gpu
from megamm.planning.layout import StageContents
from megamm.planning.tensors import trains_embedding, trains_output_layer
from megamm.planning.timing import NOTHING, Seconds, add, backward_time, forward_time, link_rate
from megamm.planning.work import Batch, Work, Workload
from megamm.recipe_checks import trainable_parts


@dataclass(frozen=True)
class Cost:
    """Of a part of the model, for one micro-batch on one rank. `trained`: weights with gradients."""

    forward: Seconds = NOTHING
    backward: Seconds = NOTHING
    again: Seconds = NOTHING
    trained: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.again + other.again,
            self.trained + other.trained,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward * -1,
            self.backward + other.backward * -1,
            self.again + other.again * -1,
            self.trained - other.trained,
        )

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.again.total


class Pieces:
    """Costs of a recipe's parts for a micro-batch, of which pipeline stages are put together.

    Attributes:
        first: what stage 0 has in front of its layers; last: what the last stage has behind them.
        layers: of the decoder, with their gated blocks, without recomputation.
        again: what recomputing each of them takes, in full or what recompute.modules name.
        seconds_until, again_until, trained_until: of the layers before each, in seconds and weights.
    """

    def __init__(self, recipe: Recipe, gpu: Gpu, batch: Batch) -> None:
        parallel, self._gpu = recipe.parallel, gpu
        self._rate = link_rate(gpu, 1, parallel.tensor * parallel.context)
        self._recipe, self._load = recipe, Workload(recipe, batch)
        gradients = layer_gradients(recipe)
        lowest = first_trained(recipe, "language")
        decoder_layer = functools.cache(self._decoder_layer)
        pairs = [
            decoder_layer(self._has_block(layer), gradient[0], gradient[1], gradient[2], layer >= lowest)
            for layer, gradient in enumerate(gradients)
        ]
        self.layers, self.again = [cost for cost, _ in pairs], [again for _, again in pairs]
        settings = recipe.training.recompute
        self._num_again = settings.layers if settings.language == "full" else None
        # sums over the layers so far, so that any stage is two differences
        self._until = list(itertools.accumulate(self.layers, Cost.__add__, initial=Cost()))
        recomputed = [Cost(again=again) for again in self.again]
        self._again_until = list(itertools.accumulate(recomputed, Cost.__add__, initial=Cost()))
        self.first = self._first()
        self.seconds_until = [cost.total for cost in self._until]
        self.again_until = [cost.total for cost in self._again_until]
        self.trained_until = [cost.trained for cost in self._until]
        # also where only rows of new tokens are trained, the whole matrix has a gradient
        self.last = self._cost(self._load.last(gradients[-1][2], trains_output_layer(recipe)))

    def stages(self, layout: list[StageContents]) -> list[Cost]:
        """Costs of pipeline stages that hold such layers."""
        return [self._stage(stage) for stage in layout]

    def _stage(self, stage: StageContents) -> Cost:
        cost = self.first if stage.holds_embedding else Cost()
        for chunk in stage.chunks:
            # what is recomputed are the first layers of each chunk
            kept = chunk.stop if self._num_again is None else min(chunk.start + self._num_again, chunk.stop)
            cost = cost + self._until[chunk.stop] - self._until[chunk.start]
            cost = cost + self._again_until[kept] - self._again_until[chunk.start]
        return cost + self.last if stage.holds_output else cost

    def _has_block(self, layer: int) -> bool:
        model = self._recipe.model
        return model.assembly == "cross_attention" and model.cross_attention.stands_before(layer)

    def _decoder_layer(
        self, has_block: bool, before: bool, between: bool, behind: bool, own: bool
    ) -> tuple[Cost, Seconds]:
        load, settings = self._load, self._recipe.training.recompute
        attention, mlp = load.attention(between, own), load.mlp(behind, own)
        works = [load.gated_block(before)] if has_block else []
        cost = functools.reduce(Cost.__add__, map(self._cost, [*works, attention, mlp]))
        if not behind or settings.language == "none":
            return cost, Seconds()
        if settings.language == "full":
            return cost, cost.forward
        again = [load.core_attention()] if "core_attn" in settings.modules else []
        again += [mlp] if "mlp" in settings.modules else []
        return cost, add(forward_time(work, self._gpu, self._rate) for work in again)

    def _first(self) -> Cost:
        """Encoder, connector, embedding."""
        recipe, load = self._recipe, self._load
        trained, settings = set(trainable_parts(recipe)), recipe.training.recompute
        cost = self._cost(load.first())
        if settings.connector and trained & {"vision", "connector"}:
            cost = cost + Cost(again=cost.forward)
        if trains_embedding(recipe):
            embedding = recipe.model.language.vocab_size * recipe.model.language.hidden_size
            cost = cost + Cost(trained=embedding / recipe.parallel.tensor)
        if recipe.model.assembly == "language":
            return cost
        v = recipe.model.vision
        used = range(v.num_layers + 1)[v.feature_layer]
        first = recipe.training.unfreeze.vision if "vision" in recipe.training.freeze else 0
        num_trained = max(0, used - first) if first is not None else 0
        blocks = [(self._cost(load.encoder(False)), used - num_trained)]
        if num_trained:
            block = self._cost(load.encoder(True))
            blocks.append((block + Cost(again=block.forward) if settings.vision else block, num_trained))
        for block, times in blocks:
            cost = cost + Cost(
                block.forward * times, block.backward * times, block.again * times, block.trained * times
            )
        return cost

    def _cost(self, work: Work) -> Cost:
        forward = forward_time(work, self._gpu, self._rate)
        return Cost(forward, backward_time(work, self._gpu, self._rate), Seconds(), work.trained)
