"""JPEG pictures decoded small: libjpeg leaves out what a reduced picture does not show.

A JPEG is made of 8 x 8 blocks of frequencies, and libjpeg can turn each into 4 x 4, 2 x 2 or 1 pixel instead
of 64: the picture at 1/2, 1/4 or 1/8 of its size, at a fraction of the cost of decoding and resizing all of
it. The result differs from that of the whole picture by 0.4 to 1.9 levels of 255 on average, by up to 3 where
the finest details are strong (roof tiles, grass).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from megamm.data.image_geometry import Geometry

SCALES = (8, 4, 2)


def scale_of(geometry: Geometry) -> int:
    """By how much a JPEG may be reduced: the most that leaves what `geometry` takes at least as large as what
    it makes of it; 1: not at all."""
    left, top, right, bottom = geometry.box
    width, height = geometry.resized
    for scale in SCALES:
        if right - left >= scale * width and bottom - top >= scale * height:
            return scale
    return 1


def cut_jpeg(image: Image.Image, geometry: Geometry, size: int, fill: tuple[int, int, int]) -> np.ndarray:
    """The square that `geometry` describes, [size, size, 3] uint8, of a JPEG that is opened but not decoded.

    Args:
        fill: colour of what lies outside the picture.
    """
    scale = scale_of(geometry)
    if scale > 1:
        image.draft("RGB", (image.width // scale, image.height // scale))
    box = _Box(*(edge / scale for edge in geometry.box))
    pixels = _resize(*_around(image.convert("RGB"), box, fill), geometry.resized)
    x, y = geometry.corner
    pixels = pixels[y : y + size, x : x + size]
    return pixels[:, ::-1] if geometry.flip else pixels


class _Box(NamedTuple):
    """A part of a picture in pixels, which need not begin or end with a whole one."""

    left: float
    top: float
    right: float
    bottom: float


def _around(image: Image.Image, box: _Box, fill: tuple[int, int, int]) -> tuple[Image.Image, _Box]:
    """The pixels that `box` touches, filled up where there are none, and the place of the box in them."""
    left, top, right, bottom = outer = (
        math.floor(box.left),
        math.floor(box.top),
        math.ceil(box.right),
        math.ceil(box.bottom),
    )
    if left < 0 or top < 0 or right > image.width or bottom > image.height:
        canvas = Image.new("RGB", (right - left, bottom - top), fill)
        canvas.paste(image, (-left, -top))
        image = canvas
    elif outer != (0, 0, *image.size):
        image = image.crop(outer)
    return image, _Box(box.left - left, box.top - top, box.right - left, box.bottom - top)


def _resize(image: Image.Image, box: _Box, size: tuple[int, int]) -> np.ndarray:
    """[height, width, 3]: `box` brought to `size` (width, height), bicubic with antialiasing.

    torch does what Pillow does (up to one level) in half the time, but for boxes that begin within a pixel.
    """
    if box.left or box.top:
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box))
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    width, height = size
    resized = torch.ops.aten._upsample_bicubic2d_aa(
        planes, [height, width], False, height / box.bottom, width / box.right
    )
    return resized[0].permute(1, 2, 0).numpy()
