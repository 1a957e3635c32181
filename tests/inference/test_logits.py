"""Logits of a loaded checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megamm.engine import checkpoint
from megamm.errors import InputError
from megamm.inference import Model, load
from tests.inference.conftest import NUM_UNKNOWN, VOCAB_SIZE

SIZE = 16


def ids_of(model: Model, counts: list[int], length: int = 20) -> torch.Tensor:
    """Random text with images from position 2 on, a word between them."""
    span, image_id = model.recipe.model.tokens_per_image, model.tokenizer.image_id
    ids = torch.randint(3, image_id, (len(counts), length))
    for row, count in enumerate(counts):
        for image in range(count):
            start = 2 + image * (span + 1)
            ids[row, start : start + span] = image_id
    return ids


def test_shape_and_dtype(model: Model) -> None:
    found = model.logits(ids_of(model, [1, 0, 2]), torch.randn(3, 3, SIZE, SIZE))
    assert found.shape == (3, 20, VOCAB_SIZE + NUM_UNKNOWN)
    assert found.dtype == torch.float32 and not found.requires_grad and found.isfinite().all()
    assert model.logits(ids_of(model, [0])).shape == (1, 20, VOCAB_SIZE + NUM_UNKNOWN)


def test_no_images_is_the_same_as_an_empty_tensor(model: Model) -> None:
    ids = ids_of(model, [0, 0])
    assert torch.equal(model.logits(ids), model.logits(ids, torch.empty(0, 3, SIZE, SIZE)))


def test_images_and_their_order_matter(model: Model) -> None:
    ids, images = ids_of(model, [2]), torch.randn(2, 3, SIZE, SIZE)
    one, other = model.logits(ids, images), model.logits(ids, images.flip(0))
    assert torch.equal(one[:, :2], other[:, :2])  # before the first image
    assert (one - other)[:, 2:].abs().amax(dim=-1).min() > 1e-4


def test_a_row_does_not_depend_on_the_others(model: Model) -> None:
    ids, images = ids_of(model, [1, 0, 2]), torch.randn(3, 3, SIZE, SIZE)
    together = model.logits(ids, images)
    for row, own in enumerate([images[:1], None, images[1:]]):
        alone = model.logits(ids[row : row + 1], own)
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


def test_what_follows_a_sequence_does_not_change_it(model: Model) -> None:
    ids, images = ids_of(model, [1, 2]), torch.randn(3, 3, SIZE, SIZE)
    whole = model.logits(ids, images)
    padding = torch.full((2, 9), model.tokenizer.pad_id)
    padded = model.logits(torch.cat([ids, padding], dim=1), images)
    torch.testing.assert_close(padded[:, :20], whole, atol=1e-4, rtol=1e-4)
    other = padding + 5
    assert torch.equal(model.logits(torch.cat([ids, other], dim=1), images)[:, :20], padded[:, :20])


def test_evaluation_mode_and_nothing_to_train_left(model: Model) -> None:
    assert not model.network.training
    assert model.recipe.training.freeze == []


@pytest.mark.parametrize(
    ("ids_shape", "images_shape", "message"),
    [
        ((20,), None, r"input_ids: shape \(20,\), expected \[batch, sequence\]"),
        ((1, 2, 20), None, r"input_ids: shape \(1, 2, 20\)"),
        ((1, 20), (3, SIZE, SIZE), rf"images: shape \(3, {SIZE}, {SIZE}\), expected \[images, 3, {SIZE}"),
        ((1, 20), (1, 1, SIZE, SIZE), r"images: shape \(1, 1"),
        ((1, 20), (1, 3, SIZE, SIZE + 8), r"images: shape \(1, 3, 16, 24\)"),
    ],
)
def test_wrong_shapes(
    ids_shape: tuple[int, ...], images_shape: tuple[int, ...] | None, message: str, model: Model
) -> None:
    images = None if images_shape is None else torch.zeros(images_shape)
    with pytest.raises(InputError, match=message):
        model.logits(torch.full(ids_shape, 5), images)


@pytest.mark.parametrize(("counts", "num_images"), [([1], 0), ([1], 2), ([0], 1), ([2, 1], 2)])
def test_wrong_number_of_images(counts: list[int], num_images: int, model: Model) -> None:
    images = torch.zeros(num_images, 3, SIZE, SIZE)
    with pytest.raises(InputError, match=rf"{num_images} images were given for {sum(counts)} placeholders"):
        model.logits(ids_of(model, counts), images)


def test_a_cut_image_is_named(models: dict[str, Model]) -> None:
    model = models["merged"]
    ids = ids_of(model, [1, 1])
    ids[1, 2] = 5
    with pytest.raises(InputError, match="sample 1: 3 image positions in the sequence"):
        model.logits(ids, torch.zeros(1, 3, SIZE, SIZE))


def test_loading_from_run_or_checkpoint(checkpoints: dict[str, Path], models: dict[str, Model]) -> None:
    run = checkpoints["merged"]
    ids = ids_of(models["merged"], [0])
    wanted = models["merged"].logits(ids)
    for path in (run / "checkpoints", checkpoint.resolve(run), str(run)):
        assert torch.equal(load(path, "cpu").logits(ids), wanted)


def test_what_cannot_be_loaded(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    with pytest.raises(InputError, match="no checkpoint here"):
        load(tmp_path, "cpu")
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.resolve(checkpoints["merged"]), copy)
    shard = next((copy / "shards").glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=rf"{shard.name}: content changed since it was saved"):
        load(copy, "cpu")
