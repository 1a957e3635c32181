"""The benchmarks themselves, at their smallest: that they run, and that both sides compute the same."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megamm.device import fp8_status
from megamm.engine import groups
from tests.tools.conftest import BENCHMARKS


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.fixture
def one_world() -> Iterator[None]:
    """What the benchmarks leave behind is cleared away."""
    threads = torch.get_num_threads()
    yield
    groups.shutdown()
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_world")
def test_a_step_of_llava_equals_transformers(tmp_path: Path) -> None:
    cases = module("step_cases")
    frozen = cases.llava_alignment("smoke", "fp32", 1, tmp_path / "a")
    assert list(frozen.seconds) == ["megamm", "transformers", "transformers, head at labels"]
    assert frozen.departure < 1e-5 and frozen.ratio("megamm") == 1
    trained = cases.llava_finetuning("smoke", "fp32", 1, tmp_path / "b")
    assert trained.departure < 1e-5 and trained.positions > 50
    table = module("step").table_of(trained)
    assert len(table.rows) == 2 and "packed rows are" in table.title


@pytest.mark.usefixtures("one_world")
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_a_flamingo_equals_plain_torch(packed: bool) -> None:
    found = module("step_cases").flamingo("smoke", "fp32", 1, packed)
    assert found.departure < 1e-5 and found.positions > 50


def test_sides_that_differ_are_noticed() -> None:
    sides = module("sides")
    one = torch.ones(4)
    assert sides.assert_equal((1.0, one), (1.0, one), "bf16", "it") == 0
    for ours in ((1.1, one), (1.0, 1.1 * one)):
        with pytest.raises(AssertionError, match="it"):
            sides.assert_equal(ours, (1.0, one), "bf16", "it")
    with pytest.raises(AssertionError):  # two gradients of nothing are no comparison
        sides.assert_equal((1.0, 0 * one), (1.0, 0 * one), "bf16", "it")


def test_the_geometry_is_that_of_the_target() -> None:
    sizes = module("step_sizes")
    tiny = sizes.SIZES["tiny"]
    assert tiny.positions(False) == 576 and tiny.language["vocab_size"] == 32000
    (batch,) = sizes.alignment_batches(sizes.SIZES["smoke"], 1)
    assert int((batch.input_ids == sizes.IMAGE_ID).sum()) == 2 * 4
    assert batch.num_labels == int((batch.labels >= 0).sum()) > 0
    assert (tiny.length - 576) / tiny.length == pytest.approx(0.2, abs=0.01)


def test_mixtures_hold_the_same_samples() -> None:
    sizes = module("step_sizes")
    size = sizes.SIZES["smoke"]
    mixed = sizes.mixture(sizes.instruction_samples(size, 80), 4, 28, 3, size.capacity, 64)
    for batches in (mixed.packed, mixed.padded):
        assert sum(batch.input_ids.numel() - batch.num_padding for batch in batches) >= mixed.positions
        assert sum(int((batch.input_ids != sizes.PAD_ID).sum()) for batch in batches) == mixed.positions
    labels = {sum(int((b.labels >= 0).sum()) for b in side) for side in (mixed.packed, mixed.padded)}
    assert len(labels) == 1 and len(mixed.packed) == len(mixed.padded) == 3


@pytest.mark.usefixtures("one_world")
def test_steps_are_measured() -> None:
    steps = module("scale_steps")
    cost = steps.measure(steps.Shape(layers=1, hidden=64, length=72, rows=1, steps=1), 1)
    assert cost.seconds > 0 and cost.held > 100_000
    for name, sweep in steps.SWEEPS.items():
        shape = sweep.shape(sweep.values[0])
        batches = steps.batches_of(shape)
        assert len(batches) == shape.micro_batches, name
        assert batches[0].input_ids.shape == (shape.rows, shape.positions), name
        assert batches[0].num_images == shape.rows * shape.images, name


def test_a_fork_that_dies_is_noticed() -> None:
    apart = module("scale_steps").apart
    assert apart(len, "four") == 4
    with pytest.raises(RuntimeError, match="_exit ended with 7"):
        apart(os._exit, 7)


def test_datasets_are_like_prepared_ones(tmp_path: Path) -> None:
    from megamm.data.indexed import PreparedDataset

    data = module("scale_data")
    tokenizer = data.make_tokenizer(tmp_path / "tokenizer")
    path = data.write_dataset(tmp_path / "out", 25, tokenizer)
    dataset = PreparedDataset(path)
    dataset.check()
    assert len(dataset) == 25 and all(len(dataset[row].tokens) >= data.TOKENS // 2 for row in range(25))
    assert data.opening_seconds(path, 1) > 0 and data.reading_seconds(dataset, 1, 1) > 0


def test_start_up_is_timed_and_missed_targets_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    startup = module("startup")
    monkeypatch.setitem(startup.STARTS, "import megamm", startup.Start(("-c", "import megamm"), 1e-6))
    result = startup.measure(1, 3, ["python alone", "import megamm"])
    assert 0 < result.values["import megamm"] < 60
    (aim,) = result.aims
    assert aim.met is False and aim.verdict == "missed"
    assert result.tables[1].title.startswith("Imports of import megamm") and len(result.tables[1].rows) == 3
    with pytest.raises(RuntimeError, match="ended with 1: ModuleNotFoundError"):
        startup.run(startup.Start(("-c", "import no_such_module")))


def test_packing_is_measured() -> None:
    table, aim = module("packing").measure(4000, (8, 32))
    assert aim.met and "% at 32 rows per step" in aim.found and len(table.rows) == 5


def test_the_aim_of_conversion_needs_both_orders() -> None:
    convert = module("convert")
    order = sorted(convert.SIDES, key=convert.backwards)
    assert order.index("import_tp2") < order.index("export_llama") and order[0] == "raw_copy"


# --- the GPU's ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_world")
def test_the_experiments_run_tiny() -> None:
    experiments = module("gpu_experiments")
    for name in ("alignment", "flamingo", "finetuning"):
        found = experiments.training(name, True)
        assert found["tokens/s"] > 0 and found["TFLOP/s"] > 0 and 0.5 < found["full"] <= 1, name
        assert json.dumps(found)
        if name == "flamingo":
            assert found["departure"] < 0.06 and found["times the peer"] > 0
    assert experiments.fused_loss(True)["ms"] > 0
    assert experiments.ceilings(True)["bf16 TFLOP/s"] > 0


def test_what_would_run_fits() -> None:
    table = module("gpu_plan").table(["alignment", "finetuning", "ceilings"])
    assert [row[0] for row in table.rows] == ["alignment", "finetuning"]
    assert {row[1] for row in table.rows} == {"7.06e9"} and {row[-1] for row in table.rows} == {"yes"}


def test_targets_of_the_gpu_are_judged() -> None:
    gpu = module("gpu")
    found = {
        "operators": {
            "rows": [
                {"op": "swiglu 1", "forward": 0.95, "backward": 0.8, "peers": {}},
                {"op": "linear_cross_entropy 1", "forward": 0.0, "backward": None, "peers": {}},
                {"op": "cross_entropy 1", "forward": 0.97, "backward": None, "peers": {"liger": 6.0}},
            ]
        },
        "alignment": {"tokens/s": 21_000.0, "samples/s": 30.0, "MFU": 0.61},
        "flamingo": {"error": "took longer than 1 s"},
        "fused loss": {"ms": 18.0, "extra GB": 0.4},
        "bf16 layers": {"tokens/s": 100.0},
        "fp8 layers": {"tokens/s": 160.0},
    }
    aims = gpu.aims(found)
    verdicts = [(aim.what, aim.verdict) for aim in aims]
    assert verdicts[:3] == [
        ("fused operators, forward", "reached"),
        ("fused operators, backward", "missed"),
        ("cross entropy against Liger", "reached"),
    ]
    assert [aim.met for aim in aims if aim.what == "alignment 7B"] == [True, True, False]
    assert [aim.met for aim in aims if aim.what.startswith("Flamingo")] == [None, None]
    assert [aim.met for aim in aims if aim.what == "fused loss"] == [True, False]
    assert next(aim for aim in aims if aim.what.startswith("FP8")).met is True
    assert next(aim for aim in aims if aim.what.startswith("fine")).found == "not asked for"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    common = module("common")
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path)]
    done = subprocess.run(
        command, env=common.quiet_environment(), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--dry-run" in done.stderr


@pytest.mark.skipif(fp8_status()["delayed"].works, reason="FP8 works here")
def test_fp8_is_left_out_with_a_reason() -> None:
    gpu = module("gpu")
    assert gpu.left_out("fp8 layers", 100, True) and not gpu.left_out("bf16 layers", 100, True)
    assert gpu.left_out("bf16 layers", 100, False).startswith("its peer")
    assert gpu.left_out("alignment", 5, False) == "the time is up"
