"""Stretches of a tensor as rectangular blocks."""

from __future__ import annotations

from math import prod

import pytest
import torch

from megamm.engine.optimizer_state import blocks


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 4), (5, 1), (3, 4, 2), (2, 1, 3, 2)])
def test_blocks_are_the_stretch_in_order(shape: tuple[int, ...]) -> None:
    whole = torch.arange(prod(shape)).view(shape)
    for start in range(prod(shape) + 1):
        for end in range(start, prod(shape) + 1):
            found = list(blocks(start, end, shape))
            pieces = [
                whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
                for offsets, sizes in found
            ]
            assert [i for piece in pieces for i in piece.tolist()] == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            assert all(prod(sizes) > 0 for _, sizes in found)
