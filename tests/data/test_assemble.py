"""Documents and rows spelled out: expansion, shifted labels, padding, packing, truncation around images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.data.assemble import Assembler
from megamm.ops import documents as operators
from megamm.ops.documents import Stretches
from tests.data import documents
from tests.data.documents import Document

IMAGE, PAD = 9, 0
_ = IGNORE_INDEX  # short, for rows of labels


@pytest.fixture(autouse=True, params=[True, False], ids=["compiled", "numpy"])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not operators._FUSED:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(operators, "_FUSED", request.param)


def document(
    tokens: list[int], learnt: list[int], length: int, per_image: int = 3, max_images: int = 8
) -> Document:
    assembler = Assembler(per_image, IMAGE, PAD)
    return documents.document(assembler, np.array(tokens), np.array(learnt), length, max_images)


def check(
    found: Document, ids: list[int], labels: list[int], images: int, dropped: int, truncated: bool
) -> None:
    """`ids` and `labels` may go on with padding."""
    length = len(found.input_ids)
    assert found.input_ids.tolist() == ids[:length] and set(ids[length:]) <= {PAD}
    assert found.labels.tolist() == labels[:length] and set(labels[length:]) <= {_}
    assert (found.num_images, found.num_dropped_images, found.truncated) == (images, dropped, truncated)
    assert found.learnt == any(label != _ for label in labels)
    assert found.input_ids.dtype == found.labels.dtype == np.int64


def test_expanded_shifted_and_padded() -> None:
    found = document([1, 9, 5, 6, 2], [0, 0, 0, 1, 1], 10)
    check(found, [1, 9, 9, 9, 5, 6, 2, 0, 0, 0], [_, _, _, _, 6, 2, _, _, _, _], 1, 0, False)


def test_one_position_per_image() -> None:
    check(
        document([1, 9, 5, 9, 2], [0, 0, 1, 0, 1], 6, 1), [1, 9, 5, 9, 2, 0], [_, 5, _, 2, _, _], 2, 0, False
    )


def test_cut_before_the_image_that_is_one_too_many() -> None:
    found = document([1, 9, 5, 9, 6, 2], [0, 0, 1, 0, 1, 1], 12, max_images=1)
    check(found, [1, 9, 9, 9, 5] + [0] * 7, [_, _, _, 5] + [_] * 8, 1, 1, True)
    found = document([1, 9, 5, 9, 6, 2], [0, 0, 1, 0, 1, 1], 6, 1, max_images=2)
    check(found, [1, 9, 5, 9, 6, 2], [_, 5, _, 6, 2, _], 2, 0, False)


def test_an_exact_fit_is_whole() -> None:
    check(document([1, 9, 5, 2], [0, 0, 1, 1], 6), [1, 9, 9, 9, 5, 2], [_, _, _, 5, 2, _], 1, 0, False)
    check(document([1, 5, 9], [0, 1, 0], 5), [1, 5, 9, 9, 9], [5, _, _, _, _], 1, 0, False)


def test_text_is_cut() -> None:
    """The last position that is kept predicts nothing: its target was cut off."""
    check(document([1, 9, 5, 6, 2], [0, 0, 1, 1, 1], 5), [1, 9, 9, 9, 5], [_, _, _, 5, _], 1, 0, True)


def test_an_image_is_never_cut() -> None:
    tokens, learnt = [1, 9, 5, 9, 6, 9, 2], [0, 0, 1, 0, 1, 0, 1]
    for length in (5, 6, 7):  # the second image would need positions 5, 6, 7
        pads = length - 5
        check(
            document(tokens, learnt, length),
            [1, 9, 9, 9, 5] + [0] * pads,
            [_, _, _, 5, _] + [_] * pads,
            1,
            2,
            True,
        )
    check(document(tokens, learnt, 8), [1, 9, 9, 9, 5, 9, 9, 9], [_, _, _, 5, _, _, _, _], 2, 1, True)
    check(document(tokens, learnt, 9), [1, 9, 9, 9, 5, 9, 9, 9, 6], [_, _, _, 5, _, _, _, 6, _], 2, 1, True)


def test_nothing_is_left_to_learn() -> None:
    check(document([1, 9, 5], [0, 0, 1], 3), [1, 0, 0], [_, _, _], 0, 1, True)
    lost = document([9, 5], [0, 1], 2)  # nothing at all: one position stands for it
    check(lost, [0], [_], 0, 1, True)
    assert len(lost.input_ids) == 1
    check(document([9], [1], 5, 1, max_images=0), [0], [_], 0, 1, True)


def test_random_samples_against_a_slow_reference() -> None:
    draw = np.random.default_rng(0)
    for _round in range(500):
        tokens = draw.integers(1, 10, draw.integers(1, 12))
        learnt = (draw.random(len(tokens)) < 0.5) & (tokens != IMAGE)
        per_image, length = int(draw.integers(1, 5)), int(draw.integers(1, 25))
        ids: list[int] = []
        flags: list[bool] = []
        images = 0
        for token, flag in zip(tokens, learnt, strict=True):
            wide = per_image if token == IMAGE else 1
            if len(ids) + wide > length:
                break
            ids += [int(token)] * wide
            flags += [bool(flag)] * wide
            images += int(token == IMAGE)
        labels = [ids[i + 1] if flags[i + 1] else _ for i in range(len(ids) - 1)]
        pads = length - len(ids)
        whole = len(tokens) + (per_image - 1) * int((tokens == IMAGE).sum())
        check(
            document(tokens.tolist(), learnt.tolist(), length, per_image),
            ids + [PAD] * pads,
            labels + [_] * (length - len(labels)),
            images,
            int((tokens == IMAGE).sum()) - images,
            len(ids) < whole,
        )


SAMPLES = [([1, 9, 5], [0, 0, 1]), ([1, 5], [0, 1]), ([9, 9, 5], [0, 0, 1])]


def collated(samples: list[tuple[list[int], list[int]]], length: int, packed: bool) -> Batch:
    stored = Stretches.of([(np.array(tokens), np.array(learnt)) for tokens, learnt in samples])
    assembler = Assembler(3, IMAGE, PAD)
    found = assembler.documents(stored, [8] * len(samples), [8] * len(samples))
    images = [torch.full((3, 4, 4), float(i)) for i in range(int(found.sizes.images.sum()))]
    ids = [7, 3, 5][: len(samples)]
    return assembler.batch(found, length, packed, images, 4, ids, 1)


def test_padded_rows() -> None:
    batch = collated(SAMPLES, 8, packed=False)
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 8)
    assert batch.input_ids[0].tolist() == [1, 9, 9, 9, 5, 0, 0, 0]
    assert batch.labels[0].tolist() == [_, _, _, 5, _, _, _, _]
    assert batch.position_ids.tolist() == [list(range(8))] * 3
    assert batch.images.shape == (3, 3, 4, 4) and batch.num_images == 3
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.images_per_sample.tolist() == [1, 0, 2]
    assert batch.sample_ids.tolist() == [7, 3, 5] and batch.num_skipped == 1
    assert batch.num_padding == 3 + 6 + 1
    assert batch.num_labels == int((batch.labels != IGNORE_INDEX).sum()) > 0
    assert batch.num_pairs == batch.labels.shape[0] * batch.labels.shape[1] ** 2 // 2
    text_only = collated(SAMPLES[1:2], 8, packed=False)
    assert text_only.images.shape == (0, 3, 4, 4) and text_only.images.dtype == torch.float32
    with pytest.raises(ValueError, match="only a packed batch"):
        batch.document_lengths()


def test_a_packed_row() -> None:
    batch = collated(SAMPLES, 18, packed=True)
    assert batch.packed and batch.num_padding == 4
    assert batch.input_ids.tolist() == [[1, 9, 9, 9, 5, 1, 5, 9, 9, 9, 9, 9, 9, 5, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[_, _, _, 5, _, 5, _, _, _, _, _, _, 5, _, _, _, _, _]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]]
    assert batch.document_lengths() == [5, 2, 7, 4]
    assert batch.images_per_sample.tolist() == [3] and batch.sample_ids.tolist() == [7, 3, 5]
    full = collated(SAMPLES, 14, packed=True)
    assert full.document_lengths() == [5, 2, 7] and full.num_padding == 0
    assert full.num_pairs == (5**2 + 2**2 + 7**2) // 2
