"""Rows spelled out: expansion, shifted labels, padding, truncation around images."""

from __future__ import annotations

import numpy as np
import torch

from megamm.batch import IGNORE_INDEX
from megamm.data.assemble import Assembler, Row, collate

IMAGE, PAD = 9, 0
_ = IGNORE_INDEX


def row(tokens: list[int], learnt: list[int], length: int, per_image: int = 3, max_images: int = 8) -> Row:
    return Assembler(length, per_image, IMAGE, PAD, max_images).row(
        np.array(tokens, np.uint16), np.array(learnt, np.uint8)
    )


def check(found: Row, ids: list[int], labels: list[int], images: int, dropped: int, truncated: bool) -> None:
    assert found.input_ids.tolist() == ids
    assert found.labels.tolist() == labels
    assert (found.num_images, found.num_dropped_images, found.truncated) == (images, dropped, truncated)
    assert found.learnt == any(label != _ for label in labels)
    assert found.input_ids.dtype == found.labels.dtype == np.int64


def test_expanded_shifted_and_padded() -> None:
    found = row([1, 9, 5, 6, 2], [0, 0, 0, 1, 1], 10)
    check(found, [1, 9, 9, 9, 5, 6, 2, 0, 0, 0], [_, _, _, _, 6, 2, _, _, _, _], 1, 0, False)


def test_one_position_per_image() -> None:
    check(row([1, 9, 5, 9, 2], [0, 0, 1, 0, 1], 6, 1), [1, 9, 5, 9, 2, 0], [_, 5, _, 2, _, _], 2, 0, False)


def test_cut_before_the_image_that_is_one_too_many() -> None:
    found = row([1, 9, 5, 9, 6, 2], [0, 0, 1, 0, 1, 1], 12, max_images=1)
    check(found, [1, 9, 9, 9, 5] + [0] * 7, [_, _, _, 5] + [_] * 8, 1, 1, True)
    found = row([1, 9, 5, 9, 6, 2], [0, 0, 1, 0, 1, 1], 6, 1, max_images=2)
    check(found, [1, 9, 5, 9, 6, 2], [_, 5, _, 6, 2, _], 2, 0, False)


def test_an_exact_fit_is_whole() -> None:
    check(row([1, 9, 5, 2], [0, 0, 1, 1], 6), [1, 9, 9, 9, 5, 2], [_, _, _, 5, 2, _], 1, 0, False)
    check(row([1, 5, 9], [0, 1, 0], 5), [1, 5, 9, 9, 9], [5, _, _, _, _], 1, 0, False)


def test_text_is_cut() -> None:
    """The last position that is kept predicts nothing: its target was cut off."""
    check(row([1, 9, 5, 6, 2], [0, 0, 1, 1, 1], 5), [1, 9, 9, 9, 5], [_, _, _, 5, _], 1, 0, True)


def test_an_image_is_never_cut() -> None:
    tokens, learnt = [1, 9, 5, 9, 6, 9, 2], [0, 0, 1, 0, 1, 0, 1]
    for length in (5, 6, 7):  # the second image would need positions 5, 6, 7
        pads = length - 5
        check(
            row(tokens, learnt, length),
            [1, 9, 9, 9, 5] + [0] * pads,
            [_, _, _, 5, _] + [_] * pads,
            1,
            2,
            True,
        )
    check(row(tokens, learnt, 8), [1, 9, 9, 9, 5, 9, 9, 9], [_, _, _, 5, _, _, _, _], 2, 1, True)
    check(row(tokens, learnt, 9), [1, 9, 9, 9, 5, 9, 9, 9, 6], [_, _, _, 5, _, _, _, 6, _], 2, 1, True)


def test_nothing_is_left_to_learn() -> None:
    check(row([1, 9, 5], [0, 0, 1], 3), [1, 0, 0], [_, _, _], 0, 1, True)
    check(row([9, 5], [0, 1], 2), [0, 0], [_, _], 0, 1, True)


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
            row(tokens.tolist(), learnt.tolist(), length, per_image),
            ids + [PAD] * pads,
            labels + [_] * (length - len(labels)),
            images,
            int((tokens == IMAGE).sum()) - images,
            len(ids) < whole,
        )


def test_collation() -> None:
    rows = [row([1, 9, 5], [0, 0, 1], 8), row([1, 5], [0, 1], 8), row([9, 9, 5], [0, 0, 1], 8)]
    images = [torch.full((3, 4, 4), float(i)) for i in range(3)]
    batch = collate(rows, images, 4, [7, 3, 5], 1)
    assert batch.input_ids.shape == batch.labels.shape == batch.position_ids.shape == (3, 8)
    assert batch.position_ids.tolist() == [list(range(8))] * 3
    assert batch.images.shape == (3, 3, 4, 4) and batch.num_images == 3
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert batch.images_per_sample.tolist() == [1, 0, 2]
    assert batch.sample_ids.tolist() == [7, 3, 5] and batch.num_skipped == 1
    text_only = collate(rows[1:2], [], 4, [3], 0)
    assert text_only.images.shape == (0, 3, 4, 4) and text_only.images.dtype == torch.float32
