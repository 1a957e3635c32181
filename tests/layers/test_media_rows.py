"""Media tokens behind hidden states, there and back."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.layers.media_rows import num_rows, pack, unpack

size = st.integers(1, 9)


@settings(max_examples=100, deadline=None)
@given(length=size, batch=st.integers(1, 4), hidden_size=size, num_tokens=size, width=size)
def test_round_trip(length: int, batch: int, hidden_size: int, num_tokens: int, width: int) -> None:
    hidden = torch.randn(length, batch, hidden_size, requires_grad=True)
    media = torch.randn(num_tokens, batch, width, requires_grad=True)
    packed = pack(hidden, media)
    rows = num_rows(num_tokens, width, hidden_size)
    assert packed.shape == (length + rows, batch, hidden_size)
    assert (rows - 1) * hidden_size < num_tokens * width <= rows * hidden_size  # no row too many
    found_hidden, found_media = unpack(packed, num_tokens, width)
    assert torch.equal(found_hidden, hidden) and torch.equal(found_media, media)
    # gradients come back through the same way
    weights = torch.randn_like(hidden), torch.randn_like(media)
    loss = (found_hidden * weights[0]).sum() + (found_media * weights[1]).sum()
    gradients = torch.autograd.grad(loss, [hidden, media])
    assert torch.equal(gradients[0], weights[0]) and torch.equal(gradients[1], weights[1])
