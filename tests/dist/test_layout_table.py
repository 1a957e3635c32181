"""The table: every kind of model, packed and not, with and without frozen parts, in every layout.

Loss, gradient norm and every gradient are those of one process (fp32), within 1e-5 of each tensor's largest
element.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import pytest

from tests.dist.harness import run_distributed
from tests.dist.test_layouts import TOLERANCE, worst_difference
from tests.dist.tiny import KINDS, LORA
from tests.dist.workers import whole_tensors

TP2, PP2 = {"parallel.tensor": 2}, {"parallel.pipeline": 2}
SP, VPP2, CP2 = {"parallel.sequence": True}, {"parallel.virtual_pipeline": 2}, {"parallel.context": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2_sp": (2, {**TP2, **SP}),
    "pp2": (2, PP2),
    "pp2_uneven": (2, {**PP2, "parallel.pipeline_layout": "Et|tttL"}),
    "pp2_vpp2": (2, {**PP2, **VPP2}),
    "pp2_vpp2_uneven": (2, {**PP2, **VPP2, "parallel.pipeline_layout": "Et|tt||tL"}),
    "tp2_pp2": (4, {**TP2, **PP2}),
    "tp2_pp2_sp": (4, {**TP2, **PP2, **SP}),
    "tp2_pp2_vpp2_sp": (4, {**TP2, **PP2, **VPP2, **SP}),
    "dp2": (2, {}),
    "dp2_pp2": (4, PP2),
    "cp2": (2, CP2),
    "cp2_tp2_sp": (4, {**CP2, **TP2, **SP}),
}
ROWS = {"": {}, "packed": {"data.pack": True}}
TRAINED = {
    "": {},
    "frozen_llm": {"training.freeze": "[language]"},
    "frozen_vit": {"training.freeze": "[vision]"},
}
SKIP_TEXT_ONLY = {"model.cross_attention.skip_text_only": True}
RECOMPUTE = {
    "training.recompute.language": "full",
    "training.recompute.vision": True,
    "training.recompute.connector": True,
}
SELECTIVE = {"training.recompute.language": "selective", "training.recompute.modules": "[core_attn, mlp]"}
LAST_BLOCKS = {
    "training.freeze": "[vision, language]",
    "training.unfreeze.vision": 1,
    "training.unfreeze.language": 2,
}
Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    **{
        "-".join(filter(None, (kind, row, frozen))): (kind, {**ROWS[row], **TRAINED[frozen]})
        for kind, row, frozen in product(KINDS, ROWS, TRAINED)
    },
    "cross_attention-skip_text_only": ("cross_attention", SKIP_TEXT_ONLY),
    "cross_attention-packed-skip_text_only": ("cross_attention", {**ROWS["packed"], **SKIP_TEXT_ONLY}),
    "cross_attention-recomputed": ("cross_attention", RECOMPUTE),
    "cross_attention-recomputed-frozen_llm": ("cross_attention", {**RECOMPUTE, **TRAINED["frozen_llm"]}),
    "merged-recomputed-last_blocks": ("merged", {**RECOMPUTE, **LAST_BLOCKS}),
    "merged-packed-selectively_recomputed": ("merged", {**ROWS["packed"], **SELECTIVE}),
    "idefics-last_blocks": ("idefics", LAST_BLOCKS),
    "merged-lora": ("merged", LORA),
    "merged-packed-lora-selectively_recomputed": ("merged", {**ROWS["packed"], **LORA, **SELECTIVE}),
    "cross_attention-lora-recomputed": ("cross_attention", {**LORA, **RECOMPUTE}),
}


def cases_of(layout: str) -> dict[str, Case]:
    """What runs in a layout: documents of a packed row are not split over context-parallel ranks."""
    return {name: case for name, case in CASES.items() if "cp2" not in layout or "packed" not in name}


@functools.cache
def reference() -> dict[str, Any]:
    """Of one process, by case."""
    [results] = run_distributed(1, "tests.dist.workers:one_step_of_cases", {"cases": CASES, "overrides": {}})
    return {
        name: {**result, "gradients": whole_tensors([result], "gradients")}
        for name, result in results.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_every_gradient(layout: str) -> None:
    world_size, overrides = LAYOUTS[layout]
    args = {"cases": cases_of(layout), "overrides": overrides}
    ranks = run_distributed(world_size, "tests.dist.workers:one_step_of_cases", args, timeout=300)
    worst = 0.0
    for case in cases_of(layout):
        results, expected = [rank[case] for rank in ranks], reference()[case]
        for result in results:
            assert result["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE), case
            assert result["grad_norm"] == pytest.approx(expected["grad_norm"], rel=TOLERANCE), case
        names = {name for result in results for name, *_ in result["gradients"]}
        assert names == expected["gradients"].keys(), case
        difference, name = worst_difference(results, expected)
        assert difference <= TOLERANCE, f"{case}: gradient of {name} differs by {difference:.1e}"
        worst = max(worst, difference)
    print(f"{layout}: {len(cases_of(layout))} cases, largest difference {worst:.1e}")
