"""The search over layouts: what it proposes is legal, fits and is as fast as it says; why others fail."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import pytest

from megamm.config import Recipe
from megamm.planning.hardware import gpu_by_name
from megamm.planning.image_activations import images_in_memory, images_of_micro_batch
from megamm.planning.layout_names import describe, overrides_of
from megamm.planning.memory import largest_stage
from megamm.planning.pieces import Pieces
from megamm.planning.search import HEADROOM, search
from megamm.planning.splits import balanced
from megamm.planning.step_time import batch_of, data_parallel_size, step_time
from megamm.recipe import recipe_from_dict, validate

A100, H100 = gpu_by_name("a100-80gb"), gpu_by_name("h100-80gb")


def recipe(*overrides: str, **sections: dict[str, Any]) -> Recipe:
    raw: dict[str, Any] = {
        "name": "p",
        "run_dir": "r",
        "tokenizer": "t",
        "model": {"language": {"preset": "llama2-13b"}, "vision": {"preset": "clip-vit-l-14-336"}},
        "data": {"train": "d", "sequence_length": 2048},
        "training": {"global_batch_size": 128, "micro_batch_size": 1, "freeze": ["vision"]},
        **sections,
    }
    return recipe_from_dict(raw, overrides=overrides)


def test_proposals_hold_what_they_promise() -> None:
    base = recipe()
    found = search(base, 64, A100, top=4)
    assert len(found.best) == 4 and found.tried > 200
    assert [c.seconds for c in found.best] == sorted(c.seconds for c in found.best)
    for candidate in found.best:
        own = recipe(*(override.replace("'", "") for override in candidate.overrides))
        assert own == candidate.recipe  # what is printed, pasted behind `megamm train`
        validate(own)
        assert data_parallel_size(own, 64) >= 1
        stage, memory = largest_stage(own, 64)
        assert (stage, memory) == (candidate.stage, candidate.memory)
        assert memory.total <= HEADROOM * A100.memory_bytes
        times = step_time(own, 64, A100)
        assert asdict(times.schedule) == asdict(candidate.schedule)
        assert times.mfu == pytest.approx(candidate.mfu)
    splits = [(c.recipe.parallel.tensor, c.recipe.parallel.pipeline) for c in found.best]
    assert len(set(splits)) == 4


def test_images_that_are_given_are_those_that_memory_holds() -> None:
    for candidate in search(recipe(), 64, A100, top=2, images=1).best:
        own, said = candidate.recipe, images_in_memory(candidate.recipe, 1)
        assert said == own.training.micro_batch_size < images_of_micro_batch(own)
        assert candidate.memory == largest_stage(own, 64, said)[1] != largest_stage(own, 64)[1]


def test_nothing_that_was_tried_is_better() -> None:
    """The sums that the search ranks by are the schedule's, with pipelines, chunks and recomputation."""
    base = recipe("data.train=[{path: a, weight: 1, sequence_length: 1024}, {path: b, weight: 1}]")
    best = search(base, 16, A100, top=1).best[0]
    for overrides in (
        ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"],
        ["parallel.tensor=4", "parallel.sequence=true", "training.micro_batch_size=4"],
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "training.recompute.language=full"],
        ["parallel.tensor=8", "parallel.sequence=true", "training.micro_batch_size=2"],
    ):
        other = replace(recipe(*overrides), data=base.data)
        fits = largest_stage(other, 16)[1].total <= HEADROOM * A100.memory_bytes
        assert not fits or step_time(other, 16, A100).seconds >= best.seconds * (1 - 1e-9)


def test_why_the_others_fail() -> None:
    sections: dict[str, Any] = {
        "model": {
            "assembly": "cross_attention",
            "language": {"preset": "llama-65b"},
            "vision": {"preset": "clip-vit-l-14"},
            "connector": {"kind": "resampler", "num_heads": 12, "head_dim": 64},
            "cross_attention": {"num_heads": 8},
        }
    }
    found = search(recipe(**sections), 64, A100, top=2)
    reasons = {refused.layout: (refused.kind, refused.reason) for refused in found.refused}
    kind, reason = reasons["TP1 PP1"]
    assert kind == "memory" and " and has 74.4 on stage 0" in reason and "gradients" in reason
    assert reasons["TP8"][0] == "layout"
    assert "model.connector.num_heads: 12 is not divisible by parallel.tensor 8" in reasons["TP8"][1]
    few = search(recipe("training.global_batch_size=4"), 16, A100)
    batch = [refused for refused in few.refused if refused.kind == "batch"]
    assert any("training.global_batch_size: 4 is not a multiple" in refused.reason for refused in batch)
    assert few.best  # in layouts with enough model parallelism


def test_no_layout_fits() -> None:
    found = search(recipe(), 1, gpu_by_name("a100-40gb"))
    assert not found.best
    assert [refused.kind for refused in found.refused] == ["memory"]


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_uneven_stages(stages: int) -> None:
    """The best of all splits, by trying them out where there are few."""
    base = recipe("model.vision.preset=openclip-vit-bigg-14", "training.micro_batch_size=4")
    pieces = Pieces(base, H100, batch_of(base, 2048, 12))
    counts = balanced(pieces, stages)
    assert sum(counts) == 40 and min(counts) >= 1 and counts[0] < 40 / stages

    def slowest(split: list[int]) -> float:
        ends = [sum(split[: n + 1]) for n in range(len(split))]
        times = [
            sum(layer.total for layer in pieces.layers[e - c : e]) for e, c in zip(ends, split, strict=True)
        ]
        times[0] += pieces.first.total
        times[-1] += pieces.last.total
        return max(times)

    if stages == 2:
        assert slowest(counts) == pytest.approx(min(slowest([n, 40 - n]) for n in range(1, 40)))
    if stages == 3:
        splits = [[a, b, 40 - a - b] for a in range(1, 39) for b in range(1, 40 - a)]
        assert slowest(counts) == pytest.approx(min(map(slowest, splits)))
    even = [40 // stages + (n < 40 % stages) for n in range(stages)]
    assert slowest(counts) < slowest(even)


def test_frozen_layers_below_the_first_trained_one_count_for_less() -> None:
    freeze = ("training.freeze=[vision, connector, language]", "training.unfreeze.language=20")
    base = recipe(*freeze)
    counts = balanced(Pieces(base, H100, batch_of(base, 2048, 1)), 4)
    assert counts[0] > counts[-1]


def test_context_parallelism_only_where_nothing_else_fits() -> None:
    assert all(c.recipe.parallel.context == 1 for c in search(recipe(), 64, A100).best)
    long = recipe("model.language.max_positions=1048576", "data.sequence_length=1048576", "data.train=d")
    found = search(long, 64, A100, top=1)
    assert not found.best or found.best[0].recipe.parallel.context > 1


def test_names() -> None:
    base = recipe()
    other = recipe(
        *("parallel.tensor=4", "parallel.sequence=true", "parallel.pipeline=2"),
        *("parallel.pipeline_layout=Et*19|t*21L", "training.recompute.language=selective"),
    )
    assert describe(other) == "TP4 PP2 Et*19|t*21L"
    assert overrides_of(other, base) == [
        "--parallel.tensor=4",
        "--parallel.pipeline=2",
        "--parallel.pipeline_layout='Et*19|t*21L'",
        "--parallel.sequence=true",
        "--training.recompute.language=selective",
    ]
    assert overrides_of(base, other)[2] == "--parallel.pipeline_layout=null"


def test_512_gpus_take_seconds() -> None:
    started = time.process_time()
    search(recipe("training.global_batch_size=2048"), 512, H100)
    assert time.process_time() - started < 2.5
