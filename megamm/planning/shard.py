"""What one rank of a layout holds: its shard of the model, built on the meta device in a fake world.

The shard is built by the code that builds it in a run, so nothing is estimated: layers, splits and frozen
parts are those of the run. What it holds in all is what `megamm plan` counts (planning/parameters.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megamm.config import Recipe
from megamm.engine import groups
from megamm.engine.groups import Groups
from megamm.errors import InputError
from megamm.models.freezing import part_of
from megamm.models.vlm import build_model
from megamm.planning.parameters import HeldBytes, held_bytes
from megamm.recipe import validate_world


@dataclass(frozen=True)
class PartShard:
    """What a rank holds of one part of the model.

    Attributes:
        total, trained: parameters, vocabulary padding included.
        weight_bytes: in the precision of the recipe.
        gradient_bytes: in fp32, of the trained parameters alone.
        optimizer_bytes: fp32 weights (if the weights are not) and both moments of AdamW, of an even share of
            the trained parameters; which parts the share of this rank is made of, its buffers decide.
    """

    total: int
    trained: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def all_bytes(self) -> int:
        """Everything that stays for the whole run; activations come on top."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    def __add__(self, other: PartShard) -> PartShard:
        return PartShard(
            self.total + other.total,
            self.trained + other.trained,
            self.weight_bytes + other.weight_bytes,
            self.gradient_bytes + other.gradient_bytes,
            self.optimizer_bytes + other.optimizer_bytes,
        )


@dataclass(frozen=True)
class RankShard:
    """One rank of a layout.

    Attributes:
        rank, world: of all processes.
        tensor, pipeline, context, data: coordinates, from 0.
        layers: decoder layers (from 0), one range for each model chunk that has any.
        holds_embedding: this rank has the embedding, with the vision encoder and the connector.
        holds_output: this rank has the output layer.
        parts: by name, as in training.freeze.
        held: bytes that stay for the whole run, exactly: with what fills up the buffers of gradients, and the
            piece of the optimizer that is this rank's.
    """

    rank: int
    world: int
    tensor: int
    pipeline: int
    context: int
    data: int
    layers: tuple[range, ...]
    holds_embedding: bool
    holds_output: bool
    parts: dict[str, PartShard]
    held: HeldBytes

    @property
    def all(self) -> PartShard:
        """All parts together."""
        return sum(self.parts.values(), PartShard(0, 0, 0, 0, 0))


def check_rank(recipe: Recipe, world: int, rank: int) -> None:
    """Whether `world` processes can run the recipe and `rank` is one of them.

    Raises:
        InputError: it is not, or the layout or the batch does not fit `world`.
    """
    validate_world(recipe, world)
    if not 0 <= rank < world:
        raise InputError(f"--rank: {rank} is not one of the {world} processes; give 0 to {world - 1}")


@contextmanager
def fake_model(recipe: Recipe, world: int, rank: int) -> Iterator[tuple[Groups, list[nn.Module]]]:
    """The groups and the model chunks of `rank`, without memory behind the weights, as long as the context
    is open.

    Raises:
        InputError: see `check_rank`.
    """
    check_rank(recipe, world, rank)
    with groups.fake_world(recipe.parallel, world, rank) as layout, torch.device("meta"):
        # the backends differ in how they compute, not in what they hold
        yield layout, build_model(recipe, layout, "local", image_token_id=0)


def build_shard(recipe: Recipe, world: int, rank: int) -> RankShard:
    """What `rank` of `world` processes holds of the recipe's model.

    Raises:
        InputError: see `check_rank`.
    """
    with fake_model(recipe, world, rank) as (layout, chunks):
        return RankShard(
            rank=rank,
            world=world,
            tensor=layout.tp_rank,
            pipeline=layout.pp_rank,
            context=layout.collection.cp.rank(),
            data=layout.dp_rank,
            layers=tuple(filter(len, map(_layers, chunks))),
            holds_embedding=layout.is_first_stage,
            holds_output=layout.is_last_stage,
            parts=_parts(chunks, recipe, layout),
            held=held_bytes(recipe, world, layout.pp_rank, layout.collection.dp_cp.rank()),
        )


def first_rank_of_stage(recipe: Recipe, world: int, stage: int) -> int:
    """The lowest rank of a pipeline stage; all ranks of a stage hold equally much. Megatron-core counts
    through the stages last."""
    return stage * (world // recipe.parallel.pipeline)


def _layers(chunk: Any) -> range:
    numbers = [layer.layer_number - 1 for layer in chunk.language.decoder.layers]
    return range(numbers[0], numbers[-1] + 1) if numbers else range(0)


def _parts(chunks: list[nn.Module], recipe: Recipe, layout: Groups) -> dict[str, PartShard]:
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    weight_bytes: Counter[str] = Counter()
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            part = part_of(name)
            total[part] += parameter.numel()
            trained[part] += parameter.numel() if parameter.requires_grad else 0
            weight_bytes[part] += parameter.numel() * parameter.element_size()
    sharers = layout.collection.dp_cp.size() if recipe.parallel.distributed_optimizer else 1
    # AdamW: two fp32 moments, and fp32 weights beside those of lower precision
    state = 8 if recipe.training.precision == "fp32" else 12
    return {
        part: PartShard(
            total[part],
            trained[part],
            weight_bytes[part],
            gradient_bytes=4 * trained[part],
            optimizer_bytes=state * -(-trained[part] // sharers),
        )
        for part in total
    }
