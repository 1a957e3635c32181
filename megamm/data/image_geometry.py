"""Which part of a picture is taken and to which size it is brought: computed here, once, for all loaders.

Random crops and flips are drawn from the key of the image alone, so a picture looks the same at a
given place of the training order whichever loader, process or restart decodes it. EXIF orientation is
ignored by every loader.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

from megamm.config import ImageConfig
from megamm.data.image_header import ImageError

CROP_ATTEMPTS = 10
CROP_LOG_RATIO = math.log(4 / 3)  # width : height of random crops lies between 3:4 and 4:3


class Geometry(NamedTuple):
    """Take `box` (left, top, right, bottom; what lies outside the picture has the mean colour), resize
    it to `resized` (width, height), cut the square at `corner` (left, top) out of that, mirror it if `flip`.
    """

    box: tuple[int, int, int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    flip: bool


def plan(config: ImageConfig, image_size: int, training: bool, width: int, height: int, key: int) -> Geometry:
    """The geometry of one picture of width x height pixels.

    Raises:
        ImageError: so long and thin that padding or resizing it would take more than max_pixels.
    """
    draw = random.Random(key)
    flip = training and config.random_flip and draw.random() < 0.5
    box = _random_box(draw, config.random_crop_scale, width, height) if training else None
    if box is not None:
        geometry = Geometry(box, (image_size, image_size), (0, 0), flip)
    else:
        geometry = _whole(config.fit, image_size, width, height)._replace(flip=flip)
    left, top, right, bottom = geometry.box
    area = max((right - left) * (bottom - top), geometry.resized[0] * geometry.resized[1])
    if area > config.max_pixels:
        raise ImageError(f"is too long and thin ({width} x {height} pixels)")
    return geometry


def _whole(fit: str, size: int, width: int, height: int) -> Geometry:
    box = (0, 0, width, height)
    if fit == "squash":
        return Geometry(box, (size, size), (0, 0), False)
    if fit == "pad":
        side = max(width, height)
        left, top = -((side - width) // 2), -((side - height) // 2)
        return Geometry((left, top, left + side, top + side), (size, size), (0, 0), False)
    # As CLIP's preprocessing: the longer edge is rounded down.
    short = min(width, height)
    resized = (int(size * width / short), int(size * height / short))
    corner = ((resized[0] - size) // 2, (resized[1] - size) // 2)
    return Geometry(box, resized, corner, False)


def _random_box(
    draw: random.Random, least: float, width: int, height: int
) -> tuple[int, int, int, int] | None:
    """A box of at least the share `least` of the picture, of a random place and shape (None: no crop)."""
    if least >= 1.0:
        return None
    for _ in range(CROP_ATTEMPTS):
        area = width * height * draw.uniform(least, 1.0)
        ratio = math.exp(draw.uniform(-CROP_LOG_RATIO, CROP_LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    return None
