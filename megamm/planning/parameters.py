"""How many parameters a rank holds, and the bytes that stay for the whole run: weights, gradients,
optimizer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from megamm.config import Recipe
from megamm.planning.tensors import Tensor, rank_tensors

# megatron-core's buffers: elements that a parameter starts at, and that a bucket is filled up to
_PARAMETER_START, _BUCKET_END = 64, 128


@dataclass(frozen=True)
class PartParameters:
    """Parameters of one part of the model that a rank holds, vocabulary padding included."""

    total: int
    trained: int


@dataclass(frozen=True)
class HeldBytes:
    """What stays on a rank for the whole run, in bytes."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def rank_parameters(recipe: Recipe, stage: int) -> dict[str, PartParameters]:
    """Parameters of every rank of a pipeline stage, by the parts that it has ("vision", "connector",
    "language", "cross_attention", "lora")."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for chunk in rank_tensors(recipe, stage):
        for tensor in chunk:
            total[tensor.part] += tensor.size
            if tensor.trained:
                trained[tensor.part] += tensor.size
    return {part: PartParameters(total[part], trained[part]) for part in total}


def held_bytes(recipe: Recipe, world: int, stage: int, sharer: int | None = None) -> HeldBytes:
    """Bytes of weights, gradient buffers and optimizer state.

    With the distributed optimizer, trained weights and their fp32 gradients lie in buffers that are filled up
    so that every rank owns an equal piece; a rank keeps fp32 weights (if the weights are not) and both
    moments of AdamW for what lies in its piece.

    Args:
        world: processes of the run.
        stage: pipeline rank.
        sharer: place among the ranks that share the optimizer; None: the one that has most.
    """
    return _held_bytes(_Rank(_key(recipe), world, stage, sharer, recipe))


@dataclass(frozen=True)
class _Rank:
    """What decides held_bytes; searches ask for the same again and again."""

    key: tuple[Any, ...]
    world: int
    stage: int
    sharer: int | None
    recipe: Recipe = field(compare=False)


def _key(recipe: Recipe) -> tuple[Any, ...]:
    """The values of a recipe that decide which parameters a rank holds, and in which form."""
    model, training, parallel = recipe.model, recipe.training, recipe.parallel
    sections = (model.language, model.vision, model.connector, model.cross_attention, model.lora)
    values = [value for one in (*sections, training.unfreeze, training.fp8) for value in vars(one).values()]
    values += [model.assembly, training.precision, training.freeze]
    values += [parallel.tensor, parallel.pipeline, parallel.virtual_pipeline, parallel.pipeline_layout]
    values += [parallel.distributed_optimizer]
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


@lru_cache(maxsize=8192)
def _held_bytes(rank: _Rank) -> HeldBytes:
    recipe, world, stage, sharer = rank.recipe, rank.world, rank.stage, rank.sharer
    parallel, fp8 = recipe.parallel, recipe.training.fp8
    element = 4 if recipe.training.precision == "fp32" else 2
    sharers = world // (parallel.tensor * parallel.pipeline) if parallel.distributed_optimizer else 1
    state = 8 if recipe.training.precision == "fp32" else 12
    # Transformer Engine keeps a weight in 8 bits twice, by rows and by columns (assumed, not measured);
    # on top of the bf16 weight
    in_8_bits = 0 if fp8.scaling == "off" else 2
    weights = gradients = 0
    owned: Counter[int] = Counter()
    for chunk in rank_tensors(recipe, stage):
        weights += sum(element * t.size + (in_8_bits * t.size if t.in_fp8 else 0) for t in chunk)
        trained = [tensor for tensor in chunk if tensor.trained]
        sizes = sum(tensor.size for tensor in trained)
        if not parallel.distributed_optimizer:
            gradients += 4 * sizes
            owned[0] += sizes
            continue
        buckets = list(_buckets(trained, sharers))
        padded = sum(bucket.size for bucket in buckets)
        gradients += 4 * padded
        weights += element * (padded - sizes)
        for bucket in buckets:
            owned.update(bucket.owned(sharers))
    most = max(owned.values(), default=0) if sharer is None else owned[sharer % sharers]
    return HeldBytes(weights, gradients, state * most)


@dataclass(frozen=True)
class _Bucket:
    """A buffer, or a part of one, that the sharers divide.

    Attributes:
        size: elements, filled up.
        places: (start, end) of its parameters.
    """

    size: int
    places: Sequence[tuple[int, int]]

    def owned(self, sharers: int) -> dict[int, int]:
        """Elements of parameters in each sharer's piece."""
        piece = self.size // sharers
        found: Counter[int] = Counter()
        for start, end in self.places:
            for sharer in range(start // piece, (end - 1) // piece + 1):
                found[sharer] += min(end, (sharer + 1) * piece) - max(start, sharer * piece)
        return found


def _buckets(trained: Sequence[Tensor], sharers: int) -> Iterator[_Bucket]:
    """How megatron-core 0.16 lays out the trained parameters of a chunk: from the last to the first, each at
    a round place; an embedding that two stages share has a bucket of its own."""
    divisor = math.lcm(sharers, _BUCKET_END)
    places: list[tuple[int, int]] = []
    position = 0
    for tensor in reversed(trained):
        if tensor.shared and places:
            yield _Bucket(_rounded(position, divisor), places)
            places, position = [], 0
        position = _rounded(position, _PARAMETER_START)
        places.append((position, position + tensor.size))
        position += tensor.size
        if tensor.shared:
            yield _Bucket(_rounded(position, divisor), places)
            places, position = [], 0
    if places:
        yield _Bucket(_rounded(position, divisor), places)


def _rounded(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
