"""Single ranks of large layouts, built in a fake world of one process."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megamm.cli import entry as cli
from megamm.config import ParallelConfig, Recipe
from megamm.engine import groups
from megamm.engine.weights import named_shards
from megamm.planning.dry_run import dry_run, parameter_counts
from megamm.planning.hardware import gpu_by_name
from megamm.planning.parameters import held_bytes
from megamm.planning.report import plan_of
from megamm.planning.shard import build_shard, fake_model, first_rank_of_stage
from megamm.recipe import load_recipe
from tests.dist.harness import run_distributed
from tests.dist.tiny import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE_65B = ROOT / "examples" / "flamingo_65b" / "pretrain.yaml"
WORLD = 512


@pytest.fixture(autouse=True)
def no_groups_left() -> Iterator[None]:
    yield
    groups.shutdown()


def test_the_65b_recipe_says_what_it_should() -> None:
    recipe = load_recipe(RECIPE_65B)
    assert (recipe.parallel.tensor, recipe.parallel.pipeline) == (8, 8)
    assert recipe.training.global_batch_size == 16 * recipe.training.micro_batch_size * 8
    counts = parameter_counts(recipe)
    # LLaMA-65B and a 32,001st token; OpenCLIP's tower without its output projection; IDEFICS' block with
    # norms of 128 over queries and keys; 6 x (k, v, q, out, feed-forward, norms), latents and a last norm
    assert counts["language"].total == 65_285_660_672 + 2 * 8192
    assert counts["vision"].total == 1_844_907_264 - 1664 * 1280
    assert counts["cross_attention"].total == 20 * (702_562_306 + 2 * 128)
    width, inner = 1664, 16 * 96
    layer = 4 * width * inner + 8 * width**2 + 3 * 2 * width + 2 * 2 * 96
    assert counts["connector"].total == 6 * layer + 64 * width + 2 * width
    assert counts["vision"].trainable == counts["language"].trainable == 0


@pytest.mark.parametrize(("rank", "stage"), [(0, 0), (259, 4), (511, 7)])
def test_a_rank_of_512_takes_seconds_and_little_memory(rank: int, stage: int) -> None:
    command = [sys.executable, "-m", "megamm", "train", str(RECIPE_65B), "--dry-run"]
    command += ["--world", str(WORLD), "--rank", str(rank)]
    blank = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "MASTER_ADDR")}
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=blank, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    assert time.perf_counter() - started < 60
    assert usage.ru_maxrss < 4 * 2**20  # KiB
    assert f"rank {rank} of 512: tensor {rank % 8}, pipeline stage {stage}, data {rank // 8 % 8}" in out
    layers = f"decoder layers {10 * stage}-{10 * stage + 9} of 80"
    assert layers in out and ("vision" in out.split("holds")[1]) == (stage == 0)


def test_the_ranks_hold_the_whole_65b_model_once() -> None:
    recipe = load_recipe(RECIPE_65B)
    shapes: dict[str, tuple[int, ...]] = {}
    held: dict[str, dict[Any, int]] = {}
    for stage in range(8):
        for tensor in range(8):
            rank = first_rank_of_stage(recipe, WORLD, stage) + tensor
            with fake_model(recipe, WORLD, rank) as (layout, chunks):
                assert (layout.pp_rank, layout.tp_rank) == (stage, tensor)
                for shard in (s for chunk in chunks for s in named_shards(chunk)):
                    shapes[shard.name] = shard.global_shape
                    place = tuple((s.start, s.stop) for s in shard.index)
                    held.setdefault(shard.name, {})[place] = shard.data.numel()
    for name, shape in shapes.items():  # the pieces of different ranks make up each tensor
        assert sum(held[name].values()) == math.prod(shape), name
    whole = sum(size.total for size in parameter_counts(recipe).values())
    padding = 2 * (32008 - 32001) * 8192  # embedding and output layer on 8 ranks
    assert sum(map(math.prod, shapes.values())) == whole + padding


def tiny(layout: dict[str, Any], **more: Any) -> Recipe:
    parallel = {f"parallel.{key}": value for key, value in layout.items()}
    return tiny_recipe("cross_attention", {**parallel, **more})


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({"pipeline": 2}, [[[0, 1]], [[2, 3]]]),
        ({"pipeline": 2, "virtual_pipeline": 2}, [[[0], [2]], [[1], [3]]]),
        ({"pipeline": 2, "pipeline_layout": "Et|t*3L"}, [[[0]], [[1, 2, 3]]]),
        ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|tt|t|tL"}, [[[2]], [[0, 1], [3]]]),
        ({"pipeline": 4, "pipeline_layout": "E|tt||ttL"}, [[], [[0, 1]], [], [[2, 3]]]),
    ],
)
def test_layers_of_each_stage(layout: dict[str, Any], layers: list[list[list[int]]]) -> None:
    recipe = tiny({**layout, "tensor": 2})
    stages = layout["pipeline"]
    world = 4 * stages
    shards = [build_shard(recipe, world, first_rank_of_stage(recipe, world, s) + 3) for s in range(stages)]
    assert [[list(numbers) for numbers in shard.layers] for shard in shards] == layers
    assert [(shard.tensor, shard.data) for shard in shards] == [(1, 1)] * stages
    assert [shard.holds_embedding for shard in shards] == [stage == 0 for stage in range(stages)]
    assert [shard.holds_output for shard in shards] == [stage == stages - 1 for stage in range(stages)]


PRECISIONS = [
    {"training.precision": precision, "parallel.distributed_optimizer": distributed}
    for precision in ("fp32", "bf16")
    for distributed in (True, False)
]


def moments(state: dict[str, Any]) -> list[torch.Tensor]:
    """Of a parameter in AdamW, without what counts its steps."""
    return [value for name, value in state.items() if name in ("exp_avg", "exp_avg_sq")]


def really_held(cases: list[dict[str, Any]]) -> list[dict[str, int]]:
    """What a real rank holds after a step, in bytes, and how many parameters."""
    from tests.dist.workers import Run

    held = []
    for overrides in cases:
        run = Run(frozen_vision(overrides))
        run.step(0)
        buffers = [buffer for model in run.wrapped for buffer in model.buffers]
        parts = getattr(run.optimizer, "chained_optimizers", [run.optimizer])
        inner = [part.optimizer for part in parts if part.optimizer]
        state = [value for one in inner for entry in one.state.values() for value in moments(entry)]
        if run.recipe.training.precision == "bf16":  # fp32 weights, of which bf16 ones are made
            state += [p for one in inner for group in one.param_groups for p in group["params"]]
        parameters = [parameter for model in run.models for parameter in model.parameters()]
        held.append(
            {
                "total": sum(p.numel() for p in parameters),
                "weights": sum(p.nbytes for p in parameters),
                "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
                "optimizer": sum(v.nbytes for v in state),
            }
        )
    groups.shutdown()
    return held


def frozen_vision(overrides: dict[str, Any]) -> Recipe:
    return tiny_recipe("cross_attention", {"training.freeze": "[vision]", **overrides})


def test_bytes_are_those_of_a_real_rank() -> None:
    ranks = run_distributed(2, "tests.planning.test_shard:really_held", {"cases": PRECISIONS})
    for overrides, first, second in zip(PRECISIONS, *ranks, strict=True):
        for rank, real in enumerate((first, second)):
            shard = build_shard(frozen_vision(overrides), 2, rank)
            plan, held = shard.all, shard.held
            assert plan.total == real["total"] and plan.weight_bytes == real["weights"]
            assert 0 < plan.trained < plan.total
            assert (held.gradients, held.optimizer) == (real["gradients"], real["optimizer"])
            # weights that are trained lie in the buffer, and what fills it up with them
            assert real["weights"] <= held.weights <= 1.1 * real["weights"]
        # parts have even shares, without what fills up the buffers
        assert plan.gradient_bytes <= second["gradients"] <= 1.1 * plan.gradient_bytes
        together = first["optimizer"] + second["optimizer"]
        assert together == pytest.approx(2 * plan.optimizer_bytes, rel=0.01)


def test_dry_run_and_plan_say_the_same() -> None:
    """Of processes, batch and bytes, for a recipe that names its hardware."""
    recipe = load_recipe(RECIPE_65B, ["--training.global_batch_size=1024"])
    plan, text = plan_of(recipe, WORLD, gpu_by_name("h100-80gb"), top=1), dry_run(recipe)
    layout = plan["layout"]
    assert f"{WORLD} processes = tensor 8 x pipeline 8 x data {layout['data']}" in text
    assert f"x data {layout['data']} x accumulation {layout['micro_batches']}" in text
    rows = [line.split() for line in dry_run(recipe, WORLD).splitlines() if "decoder layers" in line]
    for row, memory in zip(rows, plan["memory"]["stages"], strict=True):
        kinds = ("weights", "gradients", "optimizer")
        assert row[4:7] == [f"{memory[kind] / 2**30:.2f}" for kind in kinds]


def test_the_table_names_the_stage_that_holds_most() -> None:
    text = dry_run(tiny({"pipeline": 2, "tensor": 2}), world=8)
    rows = [line.split() for line in text.splitlines() if "layers" in line]
    assert [row[:2] for row in rows] == [["0", "0"], ["1", "4"]]
    assert float(rows[0][7]) == float(rows[0][4]) + float(rows[0][5]) + float(rows[0][6])
    sizes = [held_bytes(tiny({"pipeline": 2, "tensor": 2}), 8, stage).total for stage in (0, 1)]
    largest = sizes.index(max(sizes))
    assert f"those of stage {largest} (rank {4 * largest} and others)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "512", "--rank", "512"], "--rank: 512 is not one of the 512 processes"),
        (["--world", "512", "--rank=-1"], "--rank: -1 is not one of the 512 processes"),
        (["--world", "500", "--rank", "3"], "64 does not divide the 500 processes"),
        (["--world", "192", "--rank", "3"], "2048 is not a multiple of micro_batch_size 16 x data-parallel"),
        (["--world", "480", "--rank", "3", "--parallel.tensor=5"], "not divisible by parallel.tensor 5"),
        (["--world", "48", "--parallel.pipeline=6"], "80 is not divisible by parallel.pipeline 6"),
        (["--world", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_impossible_layouts_are_refused(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code: Any = cli.main(["train", str(RECIPE_65B), "--dry-run", *arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    assert code == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_a_fake_world_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")  # a launcher's world has no say when the size is given
    before = dict(os.environ)
    assert build_shard(tiny({"tensor": 2}), 4, 3).data == 1
    assert dict(os.environ) == before
    assert not dist.is_initialized() and torch.get_default_device().type == "cpu"


def test_a_fake_world_does_not_take_over_a_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real = groups.initialize(ParallelConfig(), torch.device("cpu"), "gloo")
    with pytest.raises(RuntimeError, match="fake world"):
        build_shard(tiny({"tensor": 2}), 4, 3)
    assert groups.current(torch.device("cpu")).tp_size == real.tp_size == 1
