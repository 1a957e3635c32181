"""JPEG pictures decoded small against the whole ones."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megamm.config import ImageConfig
from megamm.data.image_geometry import Geometry, plan
from megamm.data.images import ImageError, ImageLoader, make_image_loader
from megamm.data.images_pillow import cut
from megamm.data.images_scaled import cut_jpeg, scale_of
from tests.data.helpers import encode, picture

SIZE = 112
FILL = (120, 110, 100)


def photo(seed: int, width: int, height: int) -> Image.Image:
    """Coarse and fine structure, as of a photograph."""
    draw, pixels = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells, strength in ((4, 0.6), (16, 0.25), (64, 0.1), (width // 3, 0.05)):
        coarse = draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += strength * np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def loader(name: str, training: bool = True, **config: Any) -> ImageLoader:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    return make_image_loader(ImageConfig(loader=name, **config), SIZE, training)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [{"fit": "crop"}, {"fit": "pad"}, {"fit": "squash"}, {"random_crop_scale": 0.3, "random_flip": True}],
)
def test_small_decoding_is_close_to_exact(config: dict[str, Any]) -> None:
    """At most 1 of 255 levels on average, at all scales, with odd sizes; and the same from both loaders."""
    sizes = [(224, 224), (225, 227), (451, 339), (640, 480), (901, 905), (1000, 400)]
    data, scales = [], set()
    for seed, (width, height) in enumerate(sizes):
        data += [
            encode(photo(seed, width, height), "JPEG", quality=q, subsampling=s)
            for q, s in ((85, 2), (95, 0))
        ]
        data.append(encode(photo(seed, width, height).convert("L"), "JPEG", progressive=True))
        scales.add(scale_of(plan(ImageConfig(**config), SIZE, True, width, height, 3 * seed)))
    assert scales >= {2, 4}
    keys = list(range(len(data)))
    exact = loader("pillow", scaled_decode=False, **config)
    pillow, dali = (loader(name, **config) for name in ("pillow", "dali"))
    std, changed = torch.tensor(pillow.config.std)[:, None, None], 0
    for a, b, c in zip(*(each.load(data, keys) for each in (exact, pillow, dali)), strict=True):
        assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and isinstance(c, torch.Tensor)
        assert ((a - b) * std).abs().mean() <= 1 / 255
        assert torch.equal(b, c)
        changed += not torch.equal(a, b)
    assert changed == len(data)


def test_boxes_lie_where_they_should() -> None:
    """A crop of a picture whose colour is its place (a level per pixel), to a third of a pixel."""
    ramp = np.full((256, 256, 3), 128, np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(256)[None], np.arange(256)[:, None]
    data = encode(Image.fromarray(ramp), "JPEG", quality=100, subsampling=0)
    for left, top in ((0, 0), (1, 1), (2, 5), (3, 3), (13, 10)):
        for factor in (1, 2, 3, 4):
            box = (left, top, left + 60 * factor, top + 60 * factor)
            geometry = Geometry(box, (60, 60), (0, 0), False)
            assert scale_of(geometry) == (1, 2, 2, 4)[factor - 1]
            with Image.open(io.BytesIO(data)) as image:
                small = cut_jpeg(image, geometry, 60, FILL).astype(float)
            with Image.open(io.BytesIO(data)) as image:
                whole = cut(image, geometry, 60, FILL).astype(float)
            assert np.abs((small - whole).mean(axis=(0, 1))).max() < 0.35, (box, factor)
    outside = Geometry((-64, -128, 192, 384), (32, 64), (0, 0), False)
    with Image.open(io.BytesIO(data)) as image:
        pixels = cut_jpeg(image, outside, 64, FILL)
    assert (pixels[:15] == FILL).all() and (pixels[:, :7] == FILL).all() and (pixels[49:] == FILL).all()
    assert (pixels[18:46, 10:] != FILL).any(axis=2).all()


def test_only_training_decodes_small_unless_told() -> None:
    data = encode(photo(1, 640, 480), "JPEG")
    found = {}
    for training in (True, False):
        for choice in (None, True, False):
            (tensor,) = loader("pillow", training, scaled_decode=choice).load([data], [0])
            assert isinstance(tensor, torch.Tensor)
            found[training, choice] = tensor
    small, exact = found[True, True], found[True, False]
    assert not torch.equal(small, exact)
    for (training, choice), tensor in found.items():
        wanted = small if choice or (choice is None and training) else exact
        assert torch.equal(tensor, wanted), (training, choice)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_same_damage_is_refused(count: int) -> None:
    """Truncated and altered streams, baseline and progressive."""
    exact, small = (
        make_image_loader(ImageConfig(loader="pillow", scaled_decode=s), 28, True) for s in (False, True)
    )
    base = [
        encode(picture(i, 200, 150), "JPEG", quality=quality, progressive=progressive)
        for i, quality in enumerate((50, 95))
        for progressive in (False, True)
    ]
    draw, refused = random.Random(7), 0
    for _ in range(count):
        data = bytearray(draw.choice(base))
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(draw.randint(1, 3)):
                data[draw.randrange(len(data))] = draw.randrange(256)
        verdicts = [isinstance(each.load([bytes(data)], [0])[0], ImageError) for each in (exact, small)]
        assert verdicts[0] == verdicts[1], bytes(data)
        refused += verdicts[0]
    assert 0.2 < refused / count < 0.8
