"""Who attends to which image, as variable-length attention takes it: two lists of cumulative lengths.

A row of S positions that sees T images is cut into 2 T + 1 segments, always and in this order, so that their
number depends on no data and nothing has to wait for the device:

    without image | the run of image 1 | without image | the run of image 2 | ... | without image

Segments may be empty. One without image has no keys, that of an image has all of its latents, also where
no position sees the image (padding, or the run lies on another rank). So the keys are the media themselves,
sample after sample: nothing is picked or put in another order, and every key belongs to a segment, whose
backward pass then gives it a gradient, which is 0 where the segment is empty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megamm.ops import fused_devices

_FUSED_DEVICES = fused_devices("media_segments")


def media_segments(
    image: torch.Tensor, num_images: int, num_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cumulative lengths of the segments of all rows, one row after the other.

    Args:
        image: [B, S] int64, the image that each position sees, from 1; 0 (or a number beyond `num_images`)
            sees none. Within a row the images come in order, each in one run: what layers.documents'
            last_image gives, and any part of it that keeps the order of the positions.
        num_images: T, that every row is padded to.
        num_latents: L, media tokens of an image.

    Returns:
        cu_seqlens_q, of positions in the order [B, S], and cu_seqlens_k, of media tokens in that of [B, T L];
        both [B * (2 T + 1) + 1] int32.

    Raises:
        ValueError: not [B, S] int64; too many for 32 bits; images out of order (unnoticed on CUDA, where
            the lengths then mean nothing).
    """
    if image.device.type in _FUSED_DEVICES:
        return torch.ops.megamm.media_segments(image, num_images, num_latents)
    return media_segments_ref(image, num_images, num_latents)


def media_segments_ref(
    image: torch.Tensor, num_images: int, num_latents: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same function in plain torch: what the kernels are tested against and the fallback without them."""
    _check(image, num_images, num_latents)
    rows, positions = image.shape
    image = torch.where((image >= 1) & (image <= num_images), image, 0)
    latest = F.pad(image, (1, 0)).cummax(dim=1).values[:, 1:]
    if image.device.type == "cpu":
        starts_run = image != F.pad(image, (1, 0))[:, :-1]
        before = F.pad(latest, (1, 0))[:, :-1]
        if ((image > 0) & starts_run & (image <= before)).any():
            raise ValueError("media_segments: images out of order in a row")
    number = torch.arange(1, num_images + 1, device=image.device).expand(rows, -1).contiguous()
    start = torch.searchsorted(latest.contiguous(), number)
    ones = torch.ones_like(image)
    length = image.new_zeros(rows, num_images + 1).scatter_add(1, image, ones)[:, 1:]
    row = torch.arange(rows, device=image.device)[:, None]
    starts = F.pad(torch.stack([start, start + length], dim=-1).flatten(1), (1, 0)) + row * positions
    segment = torch.arange(2 * num_images + 1, device=image.device)
    tokens = (row * num_images + segment // 2) * num_latents
    cu_seqlens_q = F.pad(starts.flatten(), (0, 1), value=rows * positions)
    cu_seqlens_k = F.pad(tokens.flatten(), (0, 1), value=rows * num_images * num_latents)
    return cu_seqlens_q.int(), cu_seqlens_k.int()


def _check(image: torch.Tensor, num_images: int, num_latents: int) -> None:
    if image.dim() != 2 or image.dtype != torch.int64:
        raise ValueError(f"media_segments: image is {image.dtype} {list(image.shape)}, expected int64 [B, S]")
    if num_images < 0 or num_latents < 0:
        raise ValueError(f"media_segments: {num_images} images of {num_latents} latents")
    if max(image.numel(), image.shape[0] * num_images * num_latents) > torch.iinfo(torch.int32).max:
        raise ValueError("media_segments: more positions or media tokens than 32 bits can count")


def _fake(image: torch.Tensor, num_images: int, num_latents: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = image.shape[0] * (2 * num_images + 1) + 1
    return image.new_empty(size, dtype=torch.int32), image.new_empty(size, dtype=torch.int32)


if _FUSED_DEVICES:
    torch.library.register_fake("megamm::media_segments", _fake)
