"""Documents in one packed row give what they give alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.engine.groups import Groups
from tests.dist.tiny import IMAGE_ID, KINDS, LORA, tiny_batch, tiny_recipe
from tests.one_process import build, whole


def apart(packed: Batch, span: int) -> list[Batch]:
    """Each document of a packed row (its padding left out) as a batch of its own."""
    alone, start, first_image = [], 0, 0
    images = packed.images
    lengths = packed.document_lengths()
    for number, length in enumerate(lengths):
        row = slice(start, start + length)
        start += length
        if (packed.labels[0, row] == IGNORE_INDEX).all():
            continue  # padding, or a document of one token
        num_images = int((packed.input_ids[0, row] == IMAGE_ID).sum()) // span
        alone.append(
            Batch(
                input_ids=packed.input_ids[:, row],
                labels=packed.labels[:, row],
                position_ids=packed.position_ids[:, row],
                images=images[first_image : first_image + num_images],
                images_per_sample=torch.tensor([num_images]),
                sample_ids=packed.sample_ids[number : number + 1],
            )
        )
        first_image += num_images
    assert first_image == len(images)
    return alone


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("merged", {"model.language.sliding_window": 6}),
    ("cross_attention", {"model.cross_attention.skip_text_only": True}),
    ("merged", LORA),
]


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("kind, overrides", SETTINGS)
def test_loss_and_gradients_are_those_of_the_documents_alone(
    layout: Groups, kind: str, overrides: dict[str, Any], index: int
) -> None:
    recipe = tiny_recipe(kind, {"data.pack": True, **overrides})
    packed, span = tiny_batch(recipe, index), recipe.model.tokens_per_image

    together = build(recipe, layout)
    losses = together(packed)
    losses.sum().backward()

    single = build(tiny_recipe(kind, overrides), layout)
    alone = [single(document) for document in apart(packed, span)]
    sum(loss.sum() for loss in alone).backward()

    carries_loss = packed.labels != IGNORE_INDEX
    expected = torch.cat(
        [loss[batch.labels != IGNORE_INDEX] for loss, batch in zip(alone, apart(packed, span), strict=True)]
    )
    torch.testing.assert_close(losses[carries_loss], expected, rtol=1e-5, atol=1e-6)
    want = whole(single, lambda p: p.grad)
    # a scalar gate's gradient is a sum whose terms nearly cancel: it cannot be finer than its terms
    floor = 0.03 * max(float(gradient.abs().max()) for gradient in want.values())
    for name, gradient in whole(together, lambda p: p.grad).items():
        scale = max(float(want[name].abs().max()), floor)
        difference = float((gradient - want[name]).abs().max()) / scale
        assert difference <= 1e-5, f"gradient of {name} differs by {difference:.1e}"


def test_a_document_is_not_touched_by_the_others(layout: Groups) -> None:
    """Other tokens and another image in one document change no loss of another, bit for bit."""
    for assembly in ("merged", "cross_attention"):
        recipe = tiny_recipe(assembly, {"data.pack": True})
        model, batch = build(recipe, layout).eval(), tiny_batch(recipe, 0)
        before = model(batch)
        images = batch.images.clone()
        images[0] += 1.0  # of the first document
        ids = batch.input_ids.clone()
        ids[0, 8] = 5 if ids[0, 8] != 5 else 6
        after = model(replace(batch, images=images, input_ids=ids))
        first = batch.document_lengths()[0]
        assert not torch.equal(before[0, :first], after[0, :first])
        assert torch.equal(before[0, first:], after[0, first:])
