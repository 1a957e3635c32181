"""What one stage hands over to the next, in other layouts: weights that are made anew, and the optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.config import EMBEDDING, OUTPUT, POSITIONS
from megamm.engine.checkpoint import read_weights, resolve
from megamm.models.vision.positions import resize_positions
from tests.dist.harness import run_distributed
from tests.dist.tiny import LORA, VOCAB
from tests.dist.workers import whole_tensors

CONSTANT = {"optimizer.schedule": "constant"}
KEEP = {**CONSTANT, "training.init_optimizer": "keep"}
TENSOR = {"parallel.tensor": 2, "parallel.sequence": True}


def first_stage(overrides: dict[str, Any], directory: Path, kind: str, more: int = 2) -> list[dict[str, Any]]:
    args = {"assembly": kind, "overrides": overrides, "directory": str(directory), "steps": 2, "more": more}
    return run_distributed(2, "tests.dist.workers:save_after", args)


def next_stage(
    overrides: dict[str, Any], directory: Path, kind: str, more: int = 2, world_size: int = 2
) -> list[dict[str, Any]]:
    args = {"kind": kind, "overrides": overrides, "directory": str(directory), "first_step": 2, "more": more}
    return run_distributed(world_size, "tests.dist.stage_workers:hand_over_and_go_on", args)


@pytest.mark.slow
def test_a_kept_optimizer_goes_on_bit_for_bit_in_the_same_layout(tmp_path: Path) -> None:
    """In bf16, with its fp32 copies."""
    bf16 = {**TENSOR, "training.precision": "bf16"}
    straight = first_stage({**CONSTANT, **bf16}, tmp_path, "merged")
    kept = next_stage({**KEEP, **bf16}, tmp_path, "merged")
    for one, other in zip(straight, kept, strict=True):
        assert one["curve"] == other["curve"]
        for (name, _, _, a), (_, _, _, b) in zip(one["last"], other["last"], strict=True):
            assert torch.equal(a, b), name


def test_a_kept_optimizer_goes_on_in_another_layout(tmp_path: Path) -> None:
    straight = first_stage({**CONSTANT, **TENSOR}, tmp_path, "merged")
    kept = next_stage({**KEEP, "parallel.pipeline": 2}, tmp_path, "merged")
    for got, wanted in zip(kept[0]["curve"], straight[0]["curve"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    (fresh,) = next_stage(CONSTANT, tmp_path, "merged", world_size=1)
    assert fresh["curve"][0] == pytest.approx(straight[0]["curve"][0], rel=1e-5)
    assert abs(fresh["curve"][1][0] / straight[0]["curve"][1][0] - 1) > 1e-3, "moments must matter"


@pytest.mark.slow
def test_what_is_not_trained_any_more_is_left_out(tmp_path: Path) -> None:
    first_stage(CONSTANT, tmp_path, "cross_attention", more=0)
    frozen = {"training.freeze": "[vision, language]", "parallel.pipeline": 2}
    kept = next_stage({**KEEP, **frozen}, tmp_path, "cross_attention")
    assert any("are not trained any more, was left out" in line for line in kept[0]["lines"])
    assert all(torch.tensor(curve).isfinite().all() for curve in (result["curve"] for result in kept))


def test_tensors_that_are_made_anew_are_the_same_in_every_layout(tmp_path: Path) -> None:
    """A grown vocabulary, another image size, adapters merged: from two tensor-parallel ranks (with a padded
    vocabulary) to two others, and to one."""
    first_stage({**LORA, **TENSOR}, tmp_path, "merged", more=0)
    grown = {"model.language.vocab_size": VOCAB + 2, "model.vision.image_size": 24}
    two = next_stage({**grown, **TENSOR}, tmp_path, "merged", more=0)
    (one,) = next_stage(grown, tmp_path, "merged", more=0, world_size=1)
    old = read_weights(resolve(tmp_path))
    for new in (whole_tensors(two, "weights"), whole_tensors([one], "weights")):
        assert not any(".lora." in name for name in new)
        for name, tensor in new.items():
            if name in (EMBEDDING, OUTPUT):
                rows = old[name][:VOCAB]
                assert torch.equal(tensor[:VOCAB], rows)
                torch.testing.assert_close(tensor[VOCAB : VOCAB + 2], rows.mean(0).expand(2, -1))
                assert not tensor[VOCAB + 2 :].any()
            elif name == POSITIONS:
                assert torch.equal(tensor, resize_positions(old[name], 3))
            elif (stem := name.removesuffix("weight") + "lora.down.b") in old:
                product = (
                    old[stem] @ old[stem[:-1] + "a"] * (LORA["model.lora.alpha"] / LORA["model.lora.rank"])
                )
                torch.testing.assert_close(tensor, old[name] + product)
                assert product.abs().max() > 1e-4
            elif "linear_qkv.weight" in name or "linear_proj.weight" in name or "linear_fc1.weight" in name:
                assert not torch.equal(tensor, old[name]), name
            else:
                assert torch.equal(tensor, old[name]), name
    said = " | ".join(two[0]["lines"])
    for words in ("vocabulary grown from 67 to 69", "adapters (LoRA) added to the 16 weights", "of 16 to 24"):
        assert words in said
