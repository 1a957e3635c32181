"""Segments of tests, and the dense mask that says the same."""

from __future__ import annotations

import torch

from megamm.layers.media_segments import MediaSegments


def segments(image: list[list[int]] | torch.Tensor, num_images: int, num_latents: int) -> MediaSegments:
    """From the image that each position of each sample sees, 0 for none."""
    return MediaSegments.of(torch.as_tensor(image), num_images, num_latents)


def dense_mask(segments: MediaSegments) -> torch.Tensor:
    """[B, 1, S, M] bool, True where a position attends to a media token; the definition of the lengths."""
    batch, num_positions = segments.shape
    num_tokens = segments.num_images * segments.num_latents
    attend = torch.zeros(batch, num_positions, batch, num_tokens, dtype=torch.bool)
    flat = attend.view(batch * num_positions, batch * num_tokens)
    q, k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    assert q[0] == k[0] == 0 and (q[-1], k[-1]) == flat.shape
    for first_q, end_q, first_k, end_k in zip(q, q[1:], k, k[1:], strict=False):
        flat[first_q:end_q, first_k:end_k] = True
    own = torch.stack([attend[sample, :, sample] for sample in range(batch)])
    assert attend.sum() == own.sum()  # nobody attends to another sample
    return own[:, None]
