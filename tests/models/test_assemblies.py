"""How images enter the decoder: the merged sequence, and the masks of the gated blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.engine.groups import Groups
from megamm.errors import InputError
from megamm.models.freezing import part_of
from megamm.models.vlm import CrossAttentionModel, MergedModel
from tests.dist.tiny import IMAGE_ID, LENGTH, VOCAB, tiny_recipe
from tests.one_process import build, merge_rows, whole
from tests.segments import dense_mask

# positions that an image takes
SPANS = [("merged", 4), ("qformer", 6), ("cross_attention", 1), ("idefics", 1)]
# of image 1 and image 2 in the cross-attention batches below
FIRST, SECOND = 4, 13


def batch_of(counts: list[int], span: int, starts: tuple[int, ...] = (FIRST, SECOND)) -> Batch:
    """Random text with images at the same places in every sample that has them."""
    size = len(counts)
    ids = torch.randint(IMAGE_ID + 1, VOCAB, (size, LENGTH))
    for row, count in enumerate(counts):
        for start in starts[:count]:
            ids[row, start : start + span] = IMAGE_ID
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE_INDEX),
        position_ids=torch.arange(LENGTH).expand(size, -1),
        images=torch.randn(sum(counts), 3, 16, 16),
        images_per_sample=torch.tensor(counts),
        sample_ids=torch.arange(size) + 100,
    )


def with_image(batch: Batch, index: int) -> Batch:
    """The same batch with another picture in one place."""
    images = batch.images.clone()
    images[index] = torch.randn_like(images[index])
    return replace(batch, images=images)


@pytest.fixture
def cross(layout: Groups) -> CrossAttentionModel:
    model = build(tiny_recipe("cross_attention"), layout).eval()
    assert isinstance(model, CrossAttentionModel)
    return model


@pytest.fixture
def merged(layout: Groups) -> MergedModel:
    model = build(tiny_recipe("merged"), layout).eval()
    assert isinstance(model, MergedModel)
    return model


def text_logits(model: MergedModel | CrossAttentionModel, batch: Batch) -> torch.Tensor:
    """What the decoder alone says to the ids of a batch."""
    return model.language(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None)


# --- cross-attention ----------------------------------------------------------------------------------


@torch.no_grad()
def test_closed_gates_leave_the_language_model_as_it_was(layout: Groups) -> None:
    """Bit for bit, compared with the decoder of another assembly that has the same language weights."""
    cross = build(tiny_recipe("cross_attention"), layout, gate=0.0).eval()
    plain = build(tiny_recipe("merged"), layout).eval()
    batch = batch_of([1, 2, 0], span=1)
    wanted = text_logits(plain, batch)
    assert torch.equal(cross(batch, return_logits=True), wanted)
    opened = build(tiny_recipe("cross_attention"), layout).eval()
    assert not torch.allclose(opened(batch, return_logits=True), wanted)


@torch.no_grad()
def test_media_mask(cross: CrossAttentionModel) -> None:
    """The drawing in the class's docstring, written out."""
    ids = torch.tensor([[9, IMAGE_ID, 8, 7, IMAGE_ID, 6], [9, 8, 7, 6, IMAGE_ID, 5], [4, 5, 6, 7, 8, 9]])
    batch = replace(batch_of([2, 1, 0], span=1), input_ids=ids, position_ids=torch.arange(6).expand(3, -1))
    mask = dense_mask(cross._media_mask(ids == IMAGE_ID, batch).segments)
    latents = cross.model_config.connector.num_latents
    assert mask.shape == (3, 1, 6, 2 * latents)
    seen = mask[:, 0].view(3, 6, 2, latents)
    assert torch.equal(seen.all(-1), seen.any(-1))  # an image is seen whole or not at all
    wanted = ["011100", "000011"], ["000011", "000000"], ["000000", "000000"]
    for sample, images in enumerate(wanted):
        for image, row in enumerate(images):
            assert [int(x) for x in seen[sample, :, image, 0]] == [int(x) for x in row], (sample, image)


@torch.no_grad()
def test_an_image_reaches_its_own_text_only(cross: CrossAttentionModel) -> None:
    """One gated block, before self-attention carries anything further: bit for bit."""
    batch = batch_of([2], span=1)
    mask = cross._media_mask(cross.check_images(batch, 1), batch)
    block = cross.language.decoder.layers[1].gated_cross_attention
    x, media = torch.randn(LENGTH, 1, 64), torch.randn(8, 1, 48)
    before = block(x, media, mask)
    for image, (start, end) in enumerate([(FIRST, SECOND), (SECOND, LENGTH)]):
        changed = media.clone()
        changed[image * 4 : (image + 1) * 4] += 1.0
        rows = (block(x, changed, mask) != before).any(-1)[:, 0]
        assert rows.nonzero().flatten().tolist() == list(range(start, end))


@torch.no_grad()
@pytest.mark.parametrize(("index", "first_changed"), [(0, FIRST), (1, SECOND)])
def test_positions_before_an_image_do_not_know_it(
    cross: CrossAttentionModel, index: int, first_changed: int
) -> None:
    batch = batch_of([2, 1], span=1)
    before = cross(batch, return_logits=True)
    rows = (cross(with_image(batch, index), return_logits=True) != before).any(-1)
    assert torch.equal(rows[0], torch.arange(LENGTH) >= first_changed)
    assert not rows[1].any()


@torch.no_grad()
def test_a_sample_does_not_depend_on_the_others(cross: CrossAttentionModel) -> None:
    """Alone a sample has fewer places for images and fewer neighbours; its logits stay."""
    batch = batch_of([1, 0, 2], span=1)
    together = cross(batch, return_logits=True)
    for row in range(3):
        alone = cross(merge_rows(batch, [row]), return_logits=True)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
    without = cross(with_image(with_image(batch, 0), 2), return_logits=True)
    assert torch.equal(without[1], together[1])  # the text-only sample, bit for bit


# --- merged -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(("kind", "span"), SPANS[:2])
def test_image_embeddings_take_the_places_of_their_placeholders(kind: str, span: int, layout: Groups) -> None:
    """Compared with sequences put together by hand, sample by sample."""
    merged = build(tiny_recipe(kind), layout).eval()
    batch = batch_of([2, 0, 1], span)
    embeddings = merged.connector(merged.vision(batch.images))
    rows = []
    images = iter(embeddings)
    for row, count in enumerate(batch.images_per_sample.tolist()):
        table = merged.language.embedding.word_embeddings.weight
        pieces, at = [], 0
        for start in (FIRST, SECOND)[:count]:
            pieces += [table[batch.input_ids[row, at:start]], next(images)]
            at = start + span
        rows.append(torch.cat([*pieces, table[batch.input_ids[row, at:]]]))
    wanted = merged.language(
        input_ids=None,
        position_ids=None,
        attention_mask=None,
        decoder_input=torch.stack(rows, dim=1),
    )
    torch.testing.assert_close(merged(batch, return_logits=True), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("index", "first_changed"), [(0, FIRST), (1, SECOND)])
def test_merged_is_causal(merged: MergedModel, index: int, first_changed: int) -> None:
    batch = batch_of([2, 1], span=4)
    before = merged(batch, return_logits=True)
    rows = (merged(with_image(batch, index), return_logits=True) != before).any(-1)
    assert torch.equal(rows[0], torch.arange(LENGTH) >= first_changed)
    assert not rows[1].any()


# --- both ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("assembly", "span"), SPANS)
def test_a_text_only_batch_trains_without_images(assembly: str, span: int, layout: Groups) -> None:
    """The encoder still runs, so that every trained parameter has a gradient: zero."""
    model = build(tiny_recipe(assembly), layout)
    batch = batch_of([0, 0], span)
    losses = model(replace(batch, labels=batch.input_ids))
    losses.sum().backward()
    gradients = whole(model, lambda p: p.grad if p.requires_grad else None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("vision.")}
    assert len(trained) > 10 and trained <= set(gradients)
    for name, gradient in gradients.items():
        if part_of(name) in ("vision", "connector"):
            assert gradient.abs().max() == 0, name
    with torch.no_grad():
        if isinstance(model, MergedModel):
            assert torch.equal(model(batch, return_logits=True), text_logits(model, batch))


@pytest.mark.parametrize(("assembly", "span"), SPANS)
def test_placeholders_and_images_must_agree(assembly: str, span: int, layout: Groups) -> None:
    model = build(tiny_recipe(assembly), layout)
    batch = batch_of([1, 2], span)
    cut = batch.input_ids.clone()
    cut[1, SECOND] = 5
    with pytest.raises(
        InputError, match=rf"sample 101: {2 * span - 1} image positions .* 2 images of {span} pos"
    ):
        model(replace(batch, input_ids=cut))
    # the right total in the wrong samples
    with pytest.raises(InputError, match="sample 100"):
        model(replace(batch, images_per_sample=torch.tensor([2, 1])))
    with pytest.raises(InputError, match="2 images were given for 3 placeholders"):
        model(replace(batch, images=batch.images[:2]))


@pytest.mark.parametrize(
    "frozen", [[], ["vision"], ["vision", "language"], ["connector"], ["language", "cross_attention"]]
)
@pytest.mark.parametrize("assembly", ["merged", "cross_attention"])
def test_frozen_parts_are_exactly_those_named(assembly: str, frozen: list[str], layout: Groups) -> None:
    if "cross_attention" in frozen and assembly == "merged":
        frozen = ["language"]
    recipe = tiny_recipe(assembly, {"training.freeze": f"[{', '.join(frozen)}]"})
    model = build(recipe, layout)
    parts: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        unused = name.startswith(("vision.blocks.2.", "vision.post_norm."))  # behind the feature layer
        assert not (unused and parameter.requires_grad), name
        if not unused:
            parts.setdefault(part_of(name), set()).add(parameter.requires_grad)
    expected = {"vision", "connector", "language"} | ({"cross_attention"} if assembly != "merged" else set())
    assert parts == {part: {part not in frozen} for part in expected}


def test_only_a_trained_encoder_keeps_a_graph(layout: Groups) -> None:
    frozen = build(tiny_recipe("merged", {"training.freeze": "[vision]"}), layout)
    trained, batch = build(tiny_recipe("merged"), layout), batch_of([1], 4)
    assert trained.encode_images(batch).requires_grad and not frozen.encode_images(batch).requires_grad
    with torch.no_grad():
        assert not trained.encode_images(batch).requires_grad
