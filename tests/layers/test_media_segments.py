"""Attention segment by segment against attention with the dense mask that says the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megamm.engine.groups import Groups
from megamm.layers import cross_attention, media_segments
from megamm.layers.cross_attention import GatedCrossAttention, MediaMask
from megamm.layers.media_segments import MediaSegments, attend_to_segments
from tests.dist.tiny import tiny_recipe
from tests.one_process import build
from tests.ops.test_media_segments import rows_of_images
from tests.segments import dense_mask, segments

NUM_LATENTS, WIDTH, HIDDEN = 4, 48, 64
# image of each position: usual text, an image without text, packed documents with and without images, text
# only, an image at the very start and one that nobody sees
MIXTURES = {
    "usual": [[0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]],
    "one_position": [[0, 0, 0, 1, 2, 3, 3, 3, 3]],
    "documents": [[1, 1, 0, 0, 2, 2, 0, 3, 3], [0, 0, 0, 1, 1, 0, 0, 2, 0]],
    "text_only": [[0] * 9, [0] * 9],
    "some_text_only": [[0] * 9, [1] * 9, [0] * 9],
    "unseen": [[2, 2, 2, 0, 0, 0, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 0, 3]],
}


def mixture(name: str) -> MediaSegments:
    return segments(MIXTURES[name], num_images=max(map(max, MIXTURES[name])) + 1, num_latents=NUM_LATENTS)


def attend_with_mask(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: MediaSegments
) -> torch.Tensor:
    """All scores, those not allowed masked out; positions that may see nothing give 0."""
    mask = dense_mask(segments).to(q.device)
    sees = mask.any(-1, keepdim=True)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~sees) * sees
    return out.permute(2, 0, 1, 3)


def run_block(block: GatedCrossAttention, seen: MediaSegments) -> dict[str, torch.Tensor]:
    """The loss, the output and every gradient, in fp64."""
    torch.manual_seed(7)
    batch, num_positions = seen.shape
    sizes = (num_positions, batch, HIDDEN), (seen.num_images * seen.num_latents, batch, WIDTH)
    x, media = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    block.zero_grad()
    out = block(x, media, MediaMask(seen))
    loss = (out * torch.randn_like(out)).sum()
    loss.backward()
    found = {"loss": loss.detach(), "out": out.detach(), "x": x.grad, "media": media.grad}
    found |= {name: parameter.grad for name, parameter in block.named_parameters()}
    assert all(value is not None for value in found.values())
    return found  # type: ignore[return-value]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        scale = wanted[name].abs().max().clamp(min=1e-3)
        difference = float((value - wanted[name]).abs().max() / scale)
        assert difference <= 1e-12, f"{name} differs by {difference:.1e}"


def gated_block(kind: str, layout: Groups, skip: bool = False) -> GatedCrossAttention:
    recipe = tiny_recipe(kind, {"model.cross_attention.skip_text_only": True} if skip else {})
    blocks = [layer.gated_cross_attention for layer in build(recipe, layout).language.decoder.layers]
    block = next(block for block in blocks if block is not None)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)
    return block.double()


@pytest.mark.parametrize(
    ("kind", "skip"), [("cross_attention", False), ("cross_attention", True), ("idefics", False)]
)
@pytest.mark.parametrize("name", [*MIXTURES, "random"])
def test_loss_and_every_gradient_are_those_of_the_dense_mask(
    name: str, kind: str, skip: bool, layout: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [mixture(name)] if name in MIXTURES else []
    cases += [segments(rows_of_images(3, 40, 4), 5, NUM_LATENTS) for _ in range(5 if not cases else 0)]
    block = gated_block(kind, layout, skip)
    found = [run_block(block, seen) for seen in cases]
    monkeypatch.setattr(cross_attention, "attend_to_segments", attend_with_mask)
    for got, seen in zip(found, cases, strict=True):
        assert_same(got, run_block(block, seen))


class Scores(TorchDispatchMode):
    """Counts attention calls and their scores per head; other products are not allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.forward, self.backward = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(product in name for product in ("bmm", "::mm", "softmax")), name
        if "scaled_dot_product" in name:
            q, k = args[1:3] if "backward" in name else args[:2]
            count = q.shape[0] * q.shape[2] * k.shape[2]
            if "backward" in name:
                self.backward += count
            else:
                self.calls += 1
                self.forward += count
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MIXTURES)
def test_only_scores_that_are_wanted_are_computed(name: str) -> None:
    seen = mixture(name)
    batch, num_positions = seen.shape
    q = torch.randn(num_positions, batch, 2, 8, requires_grad=True)
    k, v = (torch.randn(seen.num_images * NUM_LATENTS, batch, 2, 8, requires_grad=True) for _ in "kv")
    wanted = sum(image > 0 for row in MIXTURES[name] for image in row) * NUM_LATENTS
    num_runs = sum(len({*row} - {0}) for row in MIXTURES[name])
    with Scores() as scores:
        attend_to_segments(q, k, v, seen).sum().backward()
    assert (scores.calls, scores.forward, scores.backward) == (num_runs, wanted, wanted)
    mask = dense_mask(seen)
    assert wanted == mask.sum()
    assert torch.equal(seen.sees_media, mask.flatten(1).any(1, keepdim=True))


@pytest.mark.parametrize("name", MIXTURES)
def test_positions_without_an_image_get_and_give_exactly_nothing(name: str) -> None:
    seen = mixture(name)
    q = torch.randn(9, seen.shape[0], 2, 8, requires_grad=True)
    k, v = (torch.randn(seen.num_images * NUM_LATENTS, seen.shape[0], 2, 8, requires_grad=True) for _ in "kv")
    with torch.no_grad():  # what nobody sees may be anything
        image = torch.tensor(MIXTURES[name]).t()
        q[image == 0] = torch.nan
        visible = dense_mask(seen).any(2)[:, 0].t()
        k[~visible] = v[~visible] = torch.nan
    out = attend_to_segments(q, k, v, seen)
    assert out[image == 0].eq(0).all() and out.isfinite().all()
    out.sum().backward()
    assert q.grad[image == 0].eq(0).all() and q.grad.isfinite().all()
    assert k.grad[~visible].eq(0).all() and v.grad[~visible].eq(0).all()
    assert not visible.any() or v.grad[visible].abs().min() > 0


def kernel_of_lengths(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, *longest: int
) -> torch.Tensor:
    """Variable-length attention as the CUDA kernels define it; a segment without keys gives 0."""
    assert longest[0] >= cu_q.diff().max() and longest[1] >= cu_k.diff().max()
    assert len(q) == cu_q[-1] and len(k) == len(v) == cu_k[-1] and len(cu_q) == len(cu_k)
    parts = []
    for own, keys, values in zip(
        *(x.split(cu.diff().tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))), strict=True
    ):
        weights = torch.einsum("qhd,khd->hqk", own / q.shape[-1] ** 0.5, keys).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts)


@pytest.mark.parametrize("name", MIXTURES)
def test_what_a_variable_length_kernel_is_given(
    name: str, layout: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop and the kernels, from the same lengths, give the same."""
    block, seen = gated_block("cross_attention", layout), mixture(name)
    wanted = run_block(block, seen)
    monkeypatch.setattr(media_segments, "_kernel_for", lambda q: kernel_of_lengths)
    assert_same(run_block(block, seen), wanted)


def test_a_kernel_is_installed_for_cuda() -> None:
    assert callable(media_segments._installed_kernel())


def test_segments_of_other_shapes_are_refused() -> None:
    seen = mixture("usual")
    q, k = torch.randn(9, 2, 2, 8), torch.randn(seen.num_images * NUM_LATENTS, 2, 2, 8)
    for wrong in ((q[1:], k), (q, k[1:]), (q[:, :1], k[:, :1])):
        with pytest.raises(ValueError, match="segments of 9 x 2 positions and 12 media tokens"):
            attend_to_segments(*wrong, wrong[1], seen)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [*MIXTURES, "large"])
def test_cuda_is_as_the_dense_mask(name: str, dtype: torch.dtype) -> None:
    """The installed kernel: also its 0 for segments without keys, and for keys without a segment."""
    image = torch.tensor(MIXTURES[name]) if name in MIXTURES else rows_of_images(3, 2000, 7)
    num_images = int(image.max()) + 1
    seen = segments(image.cuda(), num_images, 64)
    shapes = (image.shape[1], *[num_images * 64] * 2)
    inputs = [
        torch.randn(size, len(image), 4, 64, device="cuda").to(dtype).requires_grad_() for size in shapes
    ]
    grad = torch.randn(inputs[0].shape, device="cuda").to(dtype)

    def run(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = attend(*inputs, seen)
        return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]

    wanted = run(attend_with_mask, [x.detach().double().requires_grad_() for x in inputs])
    tolerance = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(run(attend_to_segments, inputs), wanted, strict=True):
        assert torch.equal(got == 0, want == 0) or dtype == torch.float16
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
