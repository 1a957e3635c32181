"""The planner's memory against the peak that the allocator of the CPU reports for a step."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megamm.config import ParallelConfig
from megamm.engine import groups
from megamm.ops import attention, linear
from megamm.planning.image_activations import images_of_micro_batch
from megamm.planning.in_flight import most_in_flight
from megamm.planning.memory import largest_stage, memory_of_stage
from tests.dist.harness import run_distributed
from tests.planning.measured import peak_of_step, recipe_of
from tests.planning.test_parameters import in_layout

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


Case = tuple[str, dict[str, Any]]
ALIGN, INSTRUCT = {"training__freeze": "[vision,language]"}, {"training__freeze": "[vision]"}
BF16 = {"training__precision": "bf16"}
FULL = {"training__recompute__language": "full"}
PARTS = {"training__recompute__language": "selective", "training__recompute__modules": "[mlp,core_attn]"}
LORA = {
    **ALIGN,
    "model__lora__rank": 16,
    "model__lora__dropout": 0.1,
    "model__lora__targets": "[q,v,up,down]",
}
EVA = {
    "model__vision__activation": "swiglu",
    "model__vision__sub_norm": "true",
    "model__vision__rotary_side": 8,
    "model__vision__qkv_bias": "qv",
    "model__vision__num_layers": 12,
}
EVA_E = {
    "model__vision__activation": "gelu",
    "model__vision__residual": "post_norm",
    "model__vision__qkv_bias": "qv",
    "model__vision__num_layers": 12,
}
WIDE = {"model__language__num_layers": 1, "model__language__vocab_size": 40000}
LARGE_IMAGES = {"model__vision__image_size": 224, "model__language__num_layers": 2, "data__max_images": 8}

FAST: list[Case] = [
    ("merged", {}),
    ("merged", {**ALIGN, "model__language__num_kv_heads": 2}),
    ("flamingo", ALIGN),
    ("flamingo", {**ALIGN, **BF16, **FULL}),
    ("merged", {**INSTRUCT, **BF16, **PARTS}),
    ("merged", {**INSTRUCT, "data__pack": "true"}),
]
SLOW: list[Case] = [
    ("flamingo", {}),
    ("flamingo", {**ALIGN, **PARTS}),
    ("flamingo", {**ALIGN, "data__pack": "true"}),
    ("flamingo", {**ALIGN, **LARGE_IMAGES}),
    ("flamingo", {"training__freeze": "[vision,language,connector]"}),
    ("flamingo", {"training__freeze": "[vision,language,cross_attention]"}),
    ("idefics", ALIGN),
    ("idefics", BF16),
    ("qformer", ALIGN),
    ("qformer", {"training__freeze": "[language]", "training__unfreeze__language": 3}),
    ("merged", {**BF16, **EVA_E}),
    ("merged", EVA),
    ("merged", LORA),
    ("merged", {**INSTRUCT, "training__micro_batch_size": 1}),
    ("merged", {**INSTRUCT, **FULL, "training__recompute__layers": 2}),
    ("merged", {**FULL, "training__recompute__vision": "true", "training__recompute__connector": "true"}),
    ("merged", {"training__freeze": "[vision,connector,language]", "training__unfreeze__language": 2}),
    ("merged", {"training__freeze": "[vision,connector,language]", "training__unfreeze__vision": 1}),
    ("merged", {**INSTRUCT, **WIDE}),
    ("merged", {**INSTRUCT, **WIDE, **BF16, "data__sequence_length": 2048}),
]


@pytest.fixture(autouse=True)
def bf16_stays_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the devices that are planned for: no fp32 copies of weights for the moment of a product."""
    for op in (linear, attention):
        monkeypatch.setattr(op, "fp32_is_faster", lambda: False)


def check(kind: str, overrides: dict[str, Any]) -> None:
    recipe = recipe_of(kind, **overrides)
    planned, peak = memory_of_stage(recipe, world=1, stage=0), peak_of_step(recipe)
    assert planned.of_step == pytest.approx(peak, rel=0.1)
    assert planned.buffers == planned.allowance == 0


@pytest.mark.parametrize(("kind", "overrides"), FAST)
def test_a_step_takes_what_is_planned(kind: str, overrides: dict[str, Any]) -> None:
    check(kind, overrides)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "overrides"), SLOW)
def test_other_steps_take_what_is_planned(kind: str, overrides: dict[str, Any]) -> None:
    check(kind, overrides)


PIPELINE = {"parallel__pipeline": 2, "training__global_batch_size": 8}


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_stages_of_a_pipeline_take_what_is_planned(chunks: int) -> None:
    """Each stage, with its micro-batches in flight, under 1F1B and the interleaved schedule."""
    layout = {**PIPELINE, **({"parallel__virtual_pipeline": chunks} if chunks > 1 else {})}
    cases = [(kind, {**layout, **more}) for kind in ("merged", "flamingo") for more in (ALIGN, INSTRUCT)]
    ranks = run_distributed(2, "tests.planning.measured:peaks", {"cases": cases}, timeout=300)
    for stage, peaks in enumerate(ranks):
        for (kind, overrides), peak in zip(cases, peaks, strict=True):
            planned = memory_of_stage(recipe_of(kind, **overrides), world=2, stage=stage)
            assert planned.of_step + planned.buffers == pytest.approx(peak, rel=0.1)


def test_micro_batches_in_flight() -> None:
    recipe = recipe_of("merged", **{**PIPELINE, "model__language__num_layers": 16})
    four = replace(recipe, parallel=ParallelConfig(pipeline=4))
    many = replace(four, training=replace(four.training, global_batch_size=64))
    assert [most_in_flight(many, 4, stage, [1]) for stage in range(4)] == [[4], [3], [2], [1]]
    few = replace(four, training=replace(four.training, global_batch_size=4))
    assert [most_in_flight(few, 4, stage, [1]) for stage in range(4)] == [[2], [2], [2], [1]]
    # interleaved: 2 (stages behind) + (chunks - 1) stages units ahead, and the one in work
    both = replace(many, parallel=ParallelConfig(pipeline=4, virtual_pipeline=2))
    assert [sum(most_in_flight(both, 4, stage, [1, 1])) for stage in range(4)] == [11, 9, 7, 5]


def test_images_of_a_micro_batch_are_bounded() -> None:
    recipe = recipe_of("merged", data__max_images=100)
    room = (recipe.data.sequence_length - 1) // recipe.model.tokens_per_image
    assert images_of_micro_batch(recipe) == recipe.training.micro_batch_size * room
    assert images_of_micro_batch(recipe_of("merged", data__max_images=1)) == 2


def test_the_largest_stage() -> None:
    recipe = recipe_of("merged", **{**INSTRUCT, **PIPELINE})
    both = [memory_of_stage(recipe, 2, stage) for stage in (0, 1)]
    assert largest_stage(recipe, 2) == max(enumerate(both), key=lambda found: found[1].total)
    assert both[0].total == sum(vars(both[0]).values())


def test_a_gpu_needs_more_than_its_tensors() -> None:
    recipe = recipe_of("merged", training__device="cuda", training__precision="bf16")
    alone, several = (memory_of_stage(recipe, world, 0).allowance for world in (1, 2))
    assert 2**29 < alone < several


def test_thousands_of_ranks_are_planned_in_seconds() -> None:
    """Also without torch, whose import alone takes longer."""
    recipe = next((ROOT / "examples").rglob("*65b/pretrain.yaml"))
    code = (
        "import sys, time\n"
        "from megamm.recipe import load_recipe\n"
        "from megamm.planning.memory import memory_of_stage\n"
        f"recipe = load_recipe({str(recipe)!r})\n"
        "start = time.process_time()\n"
        "p = recipe.parallel\n"
        "world = 8 * p.tensor * p.pipeline * p.context\n"
        "found = [memory_of_stage(recipe, world, i % p.pipeline).total for i in range(1000)]\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules\n"
        "print(time.process_time() - start)\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 3 and time.perf_counter() - started < 10


def test_the_plan_of_65b_is_what_it_should_be() -> None:
    """By hand: a stage of 10 layers and 3 gated blocks on 8 tensor ranks, bf16 weights, fp32 gradients of
    what is trained, 12 bytes of optimizer shared by 2."""
    recipe, world = in_layout("65B, IDEFICS' blocks", "TP8 PP8 SP")
    memory = memory_of_stage(recipe, world, 4)
    layers, gated = 10 * 809_500_672, 3 * 702_562_306
    assert memory.weights == pytest.approx(2 * (layers + gated) / 8, rel=1e-3)
    assert memory.gradients == pytest.approx(4 * gated / 8, rel=1e-3)
    assert memory.optimizer == pytest.approx(12 * gated / 8 / 2, rel=1e-3)
