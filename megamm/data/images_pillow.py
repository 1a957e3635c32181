"""Images by Pillow: the reference that every other loader is compared with.

With fit "crop", no augmentation and no scaled decoding, the result equals that of transformers'
CLIPImageProcessorPil.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from megamm.config import ImageConfig
from megamm.data.image_geometry import Geometry, plan
from megamm.data.image_header import ImageError, open_image
from megamm.data.images import ImageLoader
from megamm.data.images_scaled import cut_jpeg


class PillowLoader(ImageLoader):
    """Decodes in a pool of `num_workers` threads (Pillow's codecs run without the interpreter lock)."""

    name = "pillow"

    def __init__(self, config: ImageConfig, image_size: int, training: bool):
        super().__init__(config, image_size, training)
        self._table = normalisation_table(config)
        self._fill = mean_colour(config)
        self._pool = ThreadPoolExecutor(config.num_workers) if config.num_workers > 1 else None

    def load(self, data: Sequence[bytes], keys: Sequence[int]) -> list[torch.Tensor | ImageError]:
        mapped = self._pool.map if self._pool is not None and len(data) > 1 else map
        return list(mapped(self._load_one, data, keys))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _load_one(self, data: bytes, key: int) -> torch.Tensor | ImageError:
        try:
            with open_image(data, self.config.max_pixels) as image:
                geometry = plan(self.config, self.image_size, self.training, image.width, image.height, key)
                if self.scaled and image.format == "JPEG":
                    pixels = cut_jpeg(image, geometry, self.image_size, self._fill)
                else:
                    pixels = cut(to_rgb(image), geometry, self.image_size, self._fill)
        except ImageError as error:
            return error
        except Exception as error:  # decoders meet damaged bytes with exceptions of any kind
            return ImageError(f"cannot be decoded ({error})")
        return self._normalise(pixels)

    def _normalise(self, pixels: np.ndarray) -> torch.Tensor:
        out = np.empty((3, self.image_size, self.image_size), np.float32)
        for channel in range(3):
            np.take(self._table[channel], pixels[:, :, channel], out=out[channel], mode="clip")
        return torch.from_numpy(out)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any pixel layout as 8-bit RGB; transparency is dropped, 16-bit values keep their high byte."""
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255 instead of scaling them
        values = np.asarray(image)
        return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError("has floating-point pixels, whose range is unknown")
    return image.convert("RGB")


def cut(image: Image.Image, geometry: Geometry, size: int, fill: tuple[int, int, int]) -> np.ndarray:
    """The square that `geometry` describes: [size, size, 3] uint8."""
    (left, top, right, bottom), (x, y) = geometry.box, geometry.corner
    if left < 0 or top < 0 or right > image.width or bottom > image.height:
        canvas = Image.new("RGB", (right - left, bottom - top), fill)
        canvas.paste(image, (-left, -top))
        image = canvas
    elif (right - left, bottom - top) != image.size:
        image = image.crop(geometry.box)
    if image.size != geometry.resized:
        image = image.resize(geometry.resized, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)[y : y + size, x : x + size]
    return pixels[:, ::-1] if geometry.flip else pixels


def normalisation_table(config: ImageConfig) -> np.ndarray:
    """[3, 256] float32: the normalised value of every byte in every channel, rounded as by transformers."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = np.array([config.mean, config.std], np.float32)[:, :, None]
    return (scaled - mean) / std


def mean_colour(config: ImageConfig) -> tuple[int, int, int]:
    """The colour that pads, rounded down as by LLaVA."""
    red, green, blue = (int(255 * value) for value in config.mean)
    return red, green, blue
