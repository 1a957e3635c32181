"""The decoder's vocabulary: padding it changes nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megamm.batch import IGNORE_INDEX
from megamm.config.parts import padded_vocab_size
from megamm.engine.groups import Groups
from megamm.layers import decoder
from megamm.ops import linear_cross_entropy
from tests.dist.tiny import VOCAB, tiny_batch, tiny_recipe
from tests.one_process import build, whole

VOCABULARY = ("language.embedding.word_embeddings.weight", "language.output_layer.weight")


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_padded_vocab_size(vocab_size: int, tp_size: int) -> None:
    padded = padded_vocab_size(vocab_size, tp_size)
    assert padded % tp_size == 0 and vocab_size <= padded < vocab_size + tp_size


@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_neither_loss_nor_gradients(
    tied: bool, layout: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("merged", {"model.language.tie_embeddings": tied})
    batch = tiny_batch(recipe, 0)
    losses, gradients = [], []
    for padding in (0, 5):
        monkeypatch.setattr(decoder, "padded_vocab_size", lambda size, tp, more=padding: size + more)
        model = build(recipe, layout)
        assert model(batch, return_logits=True).shape[-1] == VOCAB + padding
        loss = model(batch)
        loss[batch.labels != IGNORE_INDEX].mean().backward()
        losses.append(loss.detach())
        gradients.append(whole(model, lambda p: p.grad))
    torch.testing.assert_close(losses[1], losses[0], atol=1e-6, rtol=1e-6)
    plain, padded = gradients
    assert sorted(plain) == sorted(padded)
    for name, gradient in padded.items():
        if name in VOCABULARY:
            assert gradient.shape[0] == VOCAB + 5 and gradient[VOCAB:].abs().max() == 0
            gradient = gradient[:VOCAB]
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5, msg=name)


def test_loss_is_cross_entropy(layout: Groups) -> None:
    recipe = tiny_recipe("merged")
    model, batch = build(recipe, layout), tiny_batch(recipe, 0)
    logits, losses = model(batch, return_logits=True), model(batch)
    assert losses.shape == batch.labels.shape
    wanted = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    carries_loss = batch.labels != IGNORE_INDEX
    assert 10 < carries_loss.sum() < carries_loss.numel()
    torch.testing.assert_close(losses[carries_loss], wanted[carries_loss], atol=1e-6, rtol=1e-5)
    assert not losses[~carries_loss].any()


def test_only_positions_with_a_label_reach_the_output_layer(
    layout: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("merged")
    model, batch = build(recipe, layout), tiny_batch(recipe, 0)
    rows: list[int] = []
    losses_of_rows = linear_cross_entropy.losses_of_rows

    def counted(logits: torch.Tensor, *args: Any) -> Any:
        rows.append(len(logits))
        return losses_of_rows(logits, *args)

    monkeypatch.setattr(linear_cross_entropy, "losses_of_rows", counted)
    losses = model(batch)
    assert rows == [int((batch.labels != IGNORE_INDEX).sum())] and rows[0] < 0.9 * batch.labels.numel()
    assert not losses[batch.labels == IGNORE_INDEX].any()
    # without any label there is still a graph, so that no rank waits for another's gradients
    model(replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX))).sum().backward()
    assert len(rows) == 1 and all(p.grad is not None for p in model.connector.parameters())


def test_tied_embeddings_are_one_weight(layout: Groups) -> None:
    model = build(tiny_recipe("merged", {"model.language.tie_embeddings": True}), layout)
    names = set(whole(model))
    assert VOCABULARY[0] in names and VOCABULARY[1] not in names
    assert VOCABULARY[1] in whole(build(tiny_recipe("merged"), layout))
