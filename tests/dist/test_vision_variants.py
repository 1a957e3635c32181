"""EVA's vision encoders on two tensor-parallel ranks, which deal the images between them."""

from __future__ import annotations

import pytest

from tests.dist.test_layouts import TOLERANCE, run, worst_difference
from tests.dist.workers import whole_tensors

# what sets EVA01-g, EVA02-L and EVA02-E apart from CLIP, all in one
EVA = {
    "patch_bias": "true",
    "qkv_bias": "qv",
    "pre_norm": "false",
    "activation": "swiglu",
    "sub_norm": "true",
}
EVA |= {"rotary_side": "3", "residual": "post_norm", "feature_norm": "true", "feature_layer": "-1"}


def test_gradients_of_the_last_blocks() -> None:
    """Two of three blocks trained, their activations recomputed: the gradients of one process."""
    overrides = {f"model.vision.{key}": value for key, value in EVA.items()}
    overrides |= {"training.freeze": "[vision, language]", "training.unfreeze.vision": "1"}
    recomputed = {**overrides, "training.recompute.vision": "true", "parallel.tensor": "2"}
    alone = run(1, overrides, ("merged",))["merged"]
    results = run(2, recomputed, ("merged",))["merged"]
    expected = {"gradients": whole_tensors(alone, "gradients")}
    trained = {name for name in expected["gradients"] if name.startswith("vision.")}
    assert {"vision.blocks.1.attention.q_bias", "vision.post_norm.weight"} <= trained
    assert "vision.blocks.0.norm1.bias" not in trained
    assert results[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)
    assert worst_difference(results, expected)[0] <= TOLERANCE
