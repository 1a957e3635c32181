"""Tensors that training changes while they are being written."""

from __future__ import annotations

import pytest
import torch

from megamm.engine.held_tensors import HeldTensor, HostCopies

SHAPES = [(0,), (1,), (700, 300), (3, 5, 7), ()]


def numbers(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_blocks_are_the_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (100 * torch.randn(shape)).to(dtype)
    held = HeldTensor("a", tensor)
    assert (held.shape, held.dtype) == (shape, dtype)
    assert b"".join(bytes(block) for block in held.blocks()) == numbers(tensor)


def test_rows_and_columns_are_in_order() -> None:
    tensor = torch.randn(40, 50).t()
    assert b"".join(bytes(block) for block in HeldTensor("a", tensor).blocks()) == numbers(tensor)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_was_there_when_it_was_secured_is_written(after: int) -> None:
    """Before the first block, and between two of one tensor."""
    tensor = torch.randn(400, 1000)  # seven blocks
    wanted, copies = numbers(tensor), HostCopies()
    held, found = HeldTensor("a", tensor), b""
    blocks = held.blocks()
    for _ in range(after):
        found += bytes(next(blocks))
    held.secure(copies)
    tensor.zero_()
    assert found + b"".join(bytes(block) for block in blocks) == wanted
    held.secure(copies)  # again: the copy is kept, not the zeros
    assert b"".join(bytes(block) for block in held.blocks()) == wanted


def test_memory_of_copies_is_used_again() -> None:
    copies = HostCopies()
    first = copies.copy("a", torch.ones(4))
    assert copies.copy("a", torch.zeros(4)) is first and not first.any()
    assert copies.copy("a", torch.zeros(5)) is not first
    assert copies.copy("b", torch.zeros(5)) is not copies.copy("a", torch.zeros(5))
