"""Several documents in one row: each attends to itself alone and counts its positions from 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Documents(PackedSeqParams):
    """megatron-core's description of a packed row, plus the lengths as numbers.

    Attributes:
        lengths: of the documents, in order; they fill the row.
    """

    lengths: tuple[int, ...] = ()


def documents(lengths: Sequence[int], device: torch.device, thd: bool) -> Documents:
    """The description of a row of documents with these lengths.

    Args:
        thd: whether attention takes [T, heads, d] with cumulative lengths (Transformer Engine), or
            [S, 1, heads, d] (megamm's).
    """
    # int32 and cumulative from 0, as the variable-length kernels want them
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    longest = max(lengths)
    return Documents(
        qkv_format="thd" if thd else "sbhd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
    )


def last_image(is_image: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which image each position sees: the latest one of its own document, its own placeholder included.

    Args:
        is_image: [B, S] bool, image placeholders.
        position_ids: [B, S], 0 at the start of each document.
    Returns:
        [B, S] number of the image within the row, from 1, or 0 where there is none yet; and [B, S] bool,
        whether the document has any image at all.
    """
    seen = is_image.cumsum(dim=1)
    is_start = position_ids == 0
    # images of the documents before: known where a document starts, then carried on
    before = torch.where(is_start, seen - is_image.to(seen.dtype), 0).cummax(dim=1).values
    document = is_start.cumsum(dim=1) - 1
    counts = torch.zeros_like(seen).scatter_add(1, document, is_image.to(seen.dtype))
    return torch.where(seen > before, seen, 0), counts.gather(1, document) > 0
