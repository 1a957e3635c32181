"""The arithmetic of the comparison, on made-up runs of two ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from megamm.parity.compare import INFINITE, Comparison, compare
from megamm.parity.layouts import Layout

TP2 = Layout("tp2", tensor=2)
TOLERANCE = 1e-5
EMBEDDING = "language.embedding.word_embeddings.weight"
NORM = "language.decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
BIAS = "vision.blocks.0.attention.qkv.bias"
WEIGHT = "vision.blocks.0.attention.qkv.weight"
GATES = [f"language.decoder.layers.0.gated_cross_attention.{kind}_gate" for kind in ("attention", "feed")]
IMAGES, SEQUENCE = torch.randn(3, 5), torch.randn(4, 2, 6)


def place(*ends: tuple[int, int]) -> list[tuple[int, int]]:
    return list(ends)


def reference() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "loss": 2.0,
        "grad_norm": 4.0,
        "tensor": 0,
        "context": 0,
        "gradients": {
            EMBEDDING: [(place((0, 3), (0, 2)), torch.randn(3, 2))],
            NORM: [(place((0, 2)), torch.randn(2))],
            WEIGHT: [(place((0, 2)), torch.tensor([1.0, -2.0]))],
            BIAS: [(place((0, 2)), torch.tensor([1e-9, -2e-9]))],
            GATES[0]: [(place((0, 1)), torch.tensor([1e-4]))],
            GATES[1]: [(place((0, 1)), torch.tensor([1.0]))],
        },
        "backward_order": [NORM, *GATES, EMBEDDING, WEIGHT, BIAS],
        "activations": {
            7000: {"vision.blocks.0": IMAGES, "language.embedding": SEQUENCE, "loss": SEQUENCE.clone()}
        },
    }


def ranks() -> list[dict[str, Any]]:
    """Two ranks that agree with the reference: rows of the embedding, images and positions are dealt."""
    both = [copy.deepcopy(reference()) for _ in range(2)]
    (_, whole), record = reference()["gradients"][EMBEDDING][0], reference()["activations"][7000]
    padded = torch.cat([whole, torch.zeros(1, 2)])
    images = torch.cat([IMAGES, torch.full((1, 5), 9.0)])  # what the padding becomes is nobody's business
    for number, rank in enumerate(both):
        start, stop = 2 * number, 2 * number + 2
        rank["tensor"] = number
        rank["gradients"][EMBEDDING] = [(place((start, stop), (0, 2)), padded[start:stop])]
        rank["activations"][7000] = {
            "vision.blocks.0": images[start:stop],
            "language.embedding": record["language.embedding"],
            "loss": SEQUENCE[start:stop].clone(),
        }
    return copy.deepcopy(both)


def compared(got: list[dict[str, Any]]) -> Comparison:
    return compare(reference(), got, TP2, TOLERANCE)


def test_equal_runs_have_no_difference() -> None:
    found = compared(ranks())
    assert found.largest == 0 and found.first is None
    assert set(found.gradients) == {"vision", "cross_attention", "embedding", "mlp"}


def test_differences_are_relative_to_the_largest_element() -> None:
    got = ranks()
    got[1]["gradients"][WEIGHT][0][1][0] += 0.5
    found = compared(got)
    assert found.gradients["vision"].value == pytest.approx(0.25)
    assert found.gradients["vision"].name == WEIGHT
    assert found.first is not None and (found.first.kind, found.first.name) == ("gradient", WEIGHT)


def test_loss_and_norm_are_compared_on_every_rank() -> None:
    got = ranks()
    got[1]["loss"], got[0]["grad_norm"] = 2.2, 3.0
    found = compared(got)
    assert (found.loss, found.grad_norm) == (pytest.approx(0.1), pytest.approx(0.25))
    assert found.first is None  # neither outputs nor gradients say why


def test_rounding_of_zero_and_of_cancelling_numbers_is_no_difference() -> None:
    got = ranks()
    got[0]["gradients"][BIAS][0][1].neg_()
    gate = got[1]["gradients"][GATES[0]][0][1]
    gate += 1e-6
    found = compared(got)
    assert 0 < found.largest <= TOLERANCE
    gate += 1e-4
    assert compared(got).gradients["cross_attention"].value > TOLERANCE


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_differences(number: float) -> None:
    got = ranks()
    got[0]["gradients"][NORM][0][1][1] = number
    assert compared(got).gradients["mlp"].value == INFINITE
    got = ranks()
    got[0]["loss"] = number
    assert compared(got).loss == INFINITE


def test_missing_parts_are_differences() -> None:
    got = ranks()
    del got[1]["gradients"][EMBEDDING]  # the last row is nowhere
    assert compared(got).gradients["embedding"].value == INFINITE
    got = ranks()
    for rank in got:
        del rank["gradients"][NORM]
    found = compared(got)
    assert found.first is not None and (found.first.name, found.first.value) == (NORM, INFINITE)


def test_a_gradient_that_the_reference_does_not_have_is_a_difference() -> None:
    got = ranks()
    got[1]["gradients"]["vision.post_norm.bias"] = [(place((0, 1)), torch.zeros(1))]
    found = compared(got)
    assert found.gradients["vision"].value == INFINITE
    assert found.first is not None and found.first.name == "vision.post_norm.bias"


def test_padding_of_the_vocabulary_must_not_learn() -> None:
    got = ranks()
    got[1]["gradients"][EMBEDDING][0][1][1, 0] = 0.1
    assert compared(got).gradients["embedding"].value > 0.01


@pytest.mark.parametrize(
    ("module", "index", "rank", "named"),
    [
        ("vision.blocks.0", 0, 1, "vision.blocks.0"),  # the third image
        ("vision.blocks.0", 1, 1, None),  # padding
        ("language.embedding", 3, 0, "language.embedding"),
        ("loss", 1, 1, "loss"),  # the last position
    ],
)
def test_outputs_are_compared_with_their_share(module: str, index: int, rank: int, named: str | None) -> None:
    got = ranks()
    got[rank]["activations"][7000][module][index] += 0.1
    got[0]["loss"] = 3.0  # starts the search
    first = compared(got).first
    if named is None:
        assert first is None
    else:
        assert first is not None and first.kind == "activation" and first.name == named
        assert first.place == f"micro-batch 0, rank {rank}"


def test_chunks_of_the_sequence_are_found_under_context_parallelism() -> None:
    """Positions of 8: rank (context, tensor) has 0 1 6 7 or 2 3 4 5, and of these its half."""
    want = reference()
    sequence = torch.randn(8, 2)
    want["activations"] = {0: {"language.decoder.layers.0": sequence}}
    chunks = {(0, 0): [0, 1], (0, 1): [6, 7], (1, 0): [2, 3], (1, 1): [4, 5]}
    got = []
    for (context, tensor), places in chunks.items():
        record = {0: {"language.decoder.layers.0": sequence[places]}}
        got.append({**reference(), "context": context, "tensor": tensor, "activations": record})
    got[0]["loss"] = 3.0  # starts the search
    layout = Layout("tp2cp2sp", tensor=2, context=2, sequence=True)
    assert compare(want, got, layout, TOLERANCE).first is None
    got[2]["activations"][0]["language.decoder.layers.0"][1] += 0.1
    first = compare(want, got, layout, TOLERANCE).first
    assert first is not None and first.place == "micro-batch 0, rank 2"


def test_the_first_module_in_order_is_named_although_later_ones_differ_more() -> None:
    got = ranks()
    got[0]["activations"][7000]["language.embedding"][0] += 0.01
    got[0]["activations"][7000]["loss"][0] += 100.0
    got[0]["loss"] = 3.0
    first = compared(got).first
    assert first is not None and first.name == "language.embedding"


def test_a_module_that_never_ran_is_named() -> None:
    got = ranks()
    for rank in got:
        del rank["activations"][7000]["language.embedding"]
    got[0]["loss"] = 3.0
    first = compared(got).first
    assert first is not None and (first.name, first.place) == ("language.embedding", "not run in this layout")
