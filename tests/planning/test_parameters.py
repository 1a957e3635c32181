"""The planner's formulas against ranks that are built in a fake world: parameters, and the bytes that
megatron's buffers and optimizer really take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megamm.config import ParallelConfig, Recipe, UnfreezeConfig
from megamm.engine import groups
from megamm.engine.optimizer import build_optimizer, wrap_data_parallel
from megamm.models.freezing import part_of
from megamm.planning.layout import stage_layers
from megamm.planning.parameters import held_bytes, rank_parameters
from megamm.planning.shard import build_shard, fake_model, first_rank_of_stage
from megamm.planning.tensors import rank_tensors
from tests.planning.test_parameter_counts import SYSTEMS, recipe_of


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


LAYOUTS: dict[str, tuple[ParallelConfig, int]] = {
    "one": (ParallelConfig(), 1),
    "TP2 DP3": (ParallelConfig(tensor=2), 6),
    "TP8 PP8 SP": (ParallelConfig(tensor=8, pipeline=8, sequence=True), 128),
    "PP4 uneven": (ParallelConfig(pipeline=4, pipeline_layout="E|t*3|t*9|t*{rest}L"), 8),
    "PP2 VPP2": (ParallelConfig(pipeline=2, virtual_pipeline=2), 4),
    "TP4 CP2 DP2": (ParallelConfig(tensor=4, context=2), 16),
    "TP2 PP2, replicated optimizer": (
        ParallelConfig(tensor=2, pipeline=2, distributed_optimizer=False),
        8,
    ),
}


def in_layout(name: str, layout: str, **language: Any) -> tuple[Recipe, int]:
    """A system in a layout, and how many processes that has."""
    model, training, *_ = SYSTEMS[name]
    recipe = recipe_of({**model, "language": {**model["language"], **language}}, **training)
    parallel, world = LAYOUTS[layout]
    rest = recipe.model.language.num_layers - 12
    if parallel.pipeline_layout:
        parallel = replace(parallel, pipeline_layout=parallel.pipeline_layout.format(rest=rest))
    training_ = replace(recipe.training, global_batch_size=world)
    if parallel.virtual_pipeline:
        training_ = replace(training_, global_batch_size=world * 4)
    return replace(recipe, parallel=parallel, training=training_), world


def trainings(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe, and with the last blocks of encoder and language model trained."""
    yield recipe
    freeze = ["vision", "language", "connector"]
    freeze += ["cross_attention"] * (recipe.model.assembly == "cross_attention")
    unfreeze = UnfreezeConfig(vision=10, language=recipe.model.language.num_layers - 7)
    yield replace(recipe, training=replace(recipe.training, freeze=freeze, unfreeze=unfreeze))
    yield replace(recipe, training=replace(recipe.training, freeze=[]))


FAST = [
    ("XComposer, published", "one"),
    ("InfiMM Zephyr, published", "TP2 DP3"),
    ("65B, IDEFICS' blocks", "TP8 PP8 SP"),
    ("XComposer, published", "PP4 uneven"),
    ("InfiMM Vicuna", "PP2 VPP2"),
    ("LLaVA-1.5, alignment", "TP4 CP2 DP2"),
]
SLOW = [(name, layout) for layout in LAYOUTS for name in SYSTEMS if (name, layout) not in FAST]


@pytest.mark.parametrize(
    ("name", "layout"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_parameters_are_those_of_the_model(name: str, layout: str) -> None:
    """Every tensor of every stage, in its order: part, size and whether it is trained."""
    recipe, world = in_layout(name, layout)
    for one in trainings(recipe):
        for stage in range(len(stage_layers(one))):
            with fake_model(one, world, first_rank_of_stage(one, world, stage)) as (_, chunks):
                built = [
                    [(part_of(n), p.numel(), p.requires_grad) for n, p in chunk.named_parameters()]
                    for chunk in chunks
                ]
            assert [[tensor[:3] for tensor in chunk] for chunk in rank_tensors(one, stage)] == built


def allocated(recipe: Recipe, world: int, rank: int) -> dict[str, int]:
    """Bytes that the model, megatron's buffers and its optimizer take on a rank, counted on the meta
    device."""
    with ExitStack() as stack:
        layout, chunks = stack.enter_context(fake_model(recipe, world, rank))
        # megatron asks for a device by name, and nobody answers in a fake world
        on = "megatron.core.distributed.param_and_grad_buffer.torch.cuda.current_device"
        stack.enter_context(mock.patch(on, lambda: torch.device("meta")))
        stack.enter_context(mock.patch("megamm.engine.optimizer.connect_chunks"))
        wrapped = wrap_data_parallel(chunks, recipe, layout)
        optimizer = build_optimizer(wrapped, recipe, layout)
        buffers = [buffer for model in wrapped for buffer in model.buffers]
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        own = [
            p
            for part in parts
            if part.optimizer
            for group in part.optimizer.param_groups
            for p in group["params"]
        ]
        frozen = [p for chunk in chunks for p in chunk.parameters() if not p.requires_grad]
        trained = [p for chunk in chunks for p in chunk.parameters() if p.requires_grad]
        in_buffers = [buffer.param_data for buffer in buffers if buffer.param_data is not None]
        moments = 2 * sum(4 * p.numel() for p in own)
        is_copy = recipe.training.precision != "fp32"
        assert all(p.dtype == torch.float32 for p in own)
        return {
            "weights": sum(p.nbytes for p in [*frozen, *(in_buffers or trained)]),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": moments + is_copy * sum(p.nbytes for p in own),
        }


BYTES = [
    ("LLaVA-1.5, instruction", "TP2 DP3", {}),
    ("65B, IDEFICS' blocks", "TP8 PP8 SP", {}),
    ("XComposer, published", "PP4 uneven", {"tie_embeddings": True}),
    ("InfiMM Zephyr, tuned", "PP2 VPP2", {}),
    ("InfiMM Vicuna", "TP4 CP2 DP2", {}),
    ("InfiMM 13B, every 4th, tuned", "TP2 PP2, replicated optimizer", {"tie_embeddings": True}),
    ("InfiMM Zephyr, tuned", "PP4 uneven", {"tie_embeddings": True}),
]


@pytest.mark.parametrize(("name", "layout", "language"), BYTES)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_bytes_are_those_of_buffers_and_optimizer(
    name: str, layout: str, language: dict[str, Any], precision: Any
) -> None:
    recipe, world = in_layout(name, layout, **language)
    recipe = replace(recipe, training=replace(recipe.training, precision=precision))
    for stage in range(recipe.parallel.pipeline):
        first = first_rank_of_stage(recipe, world, stage)
        data_parallel = world // recipe.parallel.pipeline // recipe.parallel.tensor
        for sharer in range(0, data_parallel, max(1, data_parallel - 1)):
            # the sharers count through context, then data
            found = allocated(recipe, world, first + sharer * recipe.parallel.tensor)
            assert vars(held_bytes(recipe, world, stage, sharer)) == found


@pytest.mark.parametrize("name", SYSTEMS)
def test_sums_are_the_published_ones(name: str) -> None:
    recipe, _ = in_layout(name, "one")
    found = rank_parameters(recipe, 0).values()
    assert (sum(part.total for part in found), sum(part.trained for part in found)) == SYSTEMS[name][2:]


@pytest.mark.parametrize("tie", [False, True])
def test_the_vocabulary_is_padded(tie: bool) -> None:
    recipe, world = in_layout("XComposer, published", "TP8 PP8 SP", tie_embeddings=tie)
    for stage in (0, 7):
        built = build_shard(recipe, world, first_rank_of_stage(recipe, world, stage)).parts
        found = rank_parameters(recipe, stage)
        assert {k: (p.total, p.trained) for k, p in found.items()} == {
            k: (p.total, p.trained) for k, p in built.items()
        }
    # 103,170 tokens are 12,897 on each of 8 ranks
    layers = rank_parameters(recipe, 1)["language"].total
    assert rank_parameters(recipe, 7)["language"].total - layers == 12_897 * 4096 + 4096
