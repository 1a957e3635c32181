"""No gradient is computed for, nor sent to, what lies below the first trained layer of a pipeline."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import pytest

from megamm.engine import groups
from megamm.engine.gradient_flow import GradientSources, P2PCommunicator, _needs_at_boundaries
from tests.dist.harness import run_distributed
from tests.dist.test_layouts import TOLERANCE, worst_difference
from tests.dist.tiny import tiny_recipe
from tests.dist.workers import Run, gradients_of, whole_tensors

MICRO_BATCHES = 4
PP4 = {"parallel.pipeline": 4}
PP2_VPP2 = {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2}
ONLY_GATED = {"training.freeze": "[vision, connector, language]"}
ONLY_LAST_LAYERS = {**ONLY_GATED, "training.unfreeze.language": 2}
ONLY_CONNECTOR = {"training.freeze": "[vision, language, cross_attention]"}
ALL_BUT_CONNECTOR = {"training.freeze": "[vision, connector]"}

# (assembly, what is frozen, layout, for each boundary between the four chunks: does it carry gradients?)
# Of the four decoder layers, the second and the fourth have a gated block.
CASES = {
    "gated_blocks_pp4": ("cross_attention", ONLY_GATED, PP4, [False, True, True]),
    "gated_blocks_pp2_vpp2": ("cross_attention", ONLY_GATED, PP2_VPP2, [False, True, True]),
    "last_layers_pp4": ("merged", ONLY_LAST_LAYERS, PP4, [False, False, True]),
    "last_layers_pp2_vpp2": ("merged", ONLY_LAST_LAYERS, PP2_VPP2, [False, False, True]),
    "connector_pp4": ("cross_attention", ONLY_CONNECTOR, PP4, [True, True, True]),
    "decoder_pp2_vpp2": ("merged", ALL_BUT_CONNECTOR, PP2_VPP2, [True, True, True]),
}


def count_messages(cases: list[str], with_layout: bool) -> dict[str, Any]:
    """One step of each case on one rank: loss, gradients, messages, layers that ran backwards."""
    results = {}
    for case in cases:
        kind, frozen, layout, _ = CASES[case]
        results[case] = _count(kind, {**frozen, **(layout if with_layout else {})})
    groups.shutdown()
    return results


def _count(kind: str, overrides: dict[str, Any]) -> dict[str, Any]:
    run = Run(tiny_recipe(kind, overrides))
    counts = {"sent": 0, "awaited": 0}
    communicate = P2PCommunicator._communicate

    def counting(self: Any, **kwargs: Any) -> Any:
        counts["sent"] += kwargs["tensor_send_prev"] is not None
        counts["awaited"] += kwargs["recv_next"]
        return communicate(self, **kwargs)

    ran_backwards: set[int] = set()

    def watch(layer: Any, args: Any, out: Any) -> None:
        if out[0].requires_grad:
            out[0].register_hook(lambda gradient: ran_backwards.add(layer.layer_number))

    for model in run.models:
        for layer in model.language.decoder.layers:
            layer.register_forward_hook(watch)
    with mock.patch.object(P2PCommunicator, "_communicate", counting):
        loss = run.forward_backward(0)
    return {"loss": loss, "gradients": gradients_of(run), "ran_backwards": sorted(ran_backwards), **counts}


@functools.cache
def results_of(layout: str) -> list[dict[str, Any]]:
    """By rank and case: the cases of a layout, or ("one") all of them in one process."""
    cases = [case for case in CASES if layout == "one" or case.endswith(layout)]
    world_size = {"one": 1, "pp4": 4, "pp2_vpp2": 2}[layout]
    args = {"cases": cases, "with_layout": layout != "one"}
    return run_distributed(world_size, "tests.dist.test_gradient_flow:count_messages", args)


@pytest.mark.parametrize("case", CASES)
def test_messages_and_backward_passes(case: str) -> None:
    alone = results_of("one")[0][case]
    ranks = [rank[case] for rank in results_of("pp4" if case.endswith("pp4") else "pp2_vpp2")]

    # the gradients are those of one process
    expected = {"gradients": whole_tensors([alone], "gradients")}
    assert ranks[0]["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
    assert {name for rank in ranks for name, *_ in rank["gradients"]} == expected["gradients"].keys()
    difference, name = worst_difference(ranks, expected)
    assert difference <= TOLERANCE, f"gradient of {name} differs by {difference:.1e}"

    # chunk c of rank r is the (c * ranks + r)-th of the pipeline; boundary i is above the i-th
    sent, awaited = [0] * len(ranks), [0] * len(ranks)
    for boundary, is_crossed in enumerate(CASES[case][-1]):
        sent[(boundary + 1) % len(ranks)] += is_crossed * MICRO_BATCHES
        awaited[boundary % len(ranks)] += is_crossed * MICRO_BATCHES
    assert [rank["sent"] for rank in ranks] == sent
    assert [rank["awaited"] for rank in ranks] == awaited

    # backward passes run through the same layers as in one process, and no others
    everywhere = sorted(number for rank in ranks for number in rank["ran_backwards"])
    assert everywhere == alone["ran_backwards"]


def test_boundaries_need_what_is_trained_below() -> None:
    nothing = GradientSources(hidden=False, media=False, mixes_media=True)
    connector = GradientSources(hidden=False, media=True, mixes_media=False)
    decoder = GradientSources(hidden=True, media=False, mixes_media=False)
    needs = [(n.hidden, n.media) for n in _needs_at_boundaries([nothing, connector, nothing, decoder])]
    assert needs == [(False, False), (False, False), (False, True), (True, True), (True, True)]
