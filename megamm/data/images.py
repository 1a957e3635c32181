"""Encoded images to normalised tensors: the interface of the loaders and the choice between them."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from megamm.config import ImageConfig
from megamm.data.image_geometry import plan
from megamm.data.image_header import ImageError
from megamm.device import num_gpus, pick_device
from megamm.errors import InputError

__all__ = ["ImageError", "ImageLoader", "make_image_loader"]


class ImageLoader(ABC):
    """Decodes, crops, resizes and normalises images.

    Attributes:
        name: "dali" or "pillow".
        scaled: JPEG pictures are decoded small where that will do (images_scaled.py).
    """

    name: str

    def __init__(self, config: ImageConfig, image_size: int, training: bool):
        self.config, self.image_size, self.training = config, image_size, training
        self.scaled = training if config.scaled_decode is None else config.scaled_decode

    @abstractmethod
    def load(self, data: Sequence[bytes], keys: Sequence[int]) -> list[torch.Tensor | ImageError]:
        """The images encoded in `data`, each [3, image_size, image_size] float32, or why it has none.

        Args:
            keys: one number per image; in training it alone decides crop and flip.
        """

    def close(self) -> None:  # noqa: B027 (a loader without threads has nothing to close)
        """Stop the threads of the loader."""


def make_image_loader(config: ImageConfig, image_size: int, training: bool) -> ImageLoader:
    """The loader that `config.loader` asks for; "auto" takes DALI where it works.

    Raises:
        InputError: DALI or a GPU is asked for by name and does not work here.
    """
    from megamm.data.images_pillow import PillowLoader

    # Pillow's own limit would refuse pictures that the recipe admits; `open_image` checks the recipe's.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, config.max_pixels)
    on_gpu = decoding_device(config, training).type == "cuda"
    if config.loader != "pillow":
        try:
            return _working_dali(config, image_size, training)
        except Exception as error:  # a library that is absent, or does not fit the machine
            if on_gpu:
                raise InputError(
                    f"data.image.decode_device: gpu needs DALI, which does not work here "
                    f"({_first_line(error)}); install megamm[dali] or set data.image.decode_device=cpu"
                ) from None
            if config.loader == "dali":
                raise InputError(
                    f"data.image.loader: DALI does not work here ({_first_line(error)}); "
                    "install megamm[dali] or choose pillow"
                ) from None
    return PillowLoader(config, image_size, training)


def decoding_device(config: ImageConfig, training: bool) -> torch.device:
    """Where pictures are decoded: the GPU of this process in training with decode_device "gpu", else the CPU
    ("auto" too: the GPU has the model to compute).

    Raises:
        InputError: a GPU is asked for and there is none.
    """
    if config.decode_device != "gpu" or not training:
        return torch.device("cpu")
    if not num_gpus():
        raise InputError(
            "data.image.decode_device: gpu was asked for, but torch finds no CUDA device; "
            "set data.image.decode_device=cpu"
        )
    return pick_device("cuda")


def _working_dali(config: ImageConfig, image_size: int, training: bool) -> ImageLoader:
    """A DALI loader that has decoded a picture; raises whatever DALI raises if it cannot."""
    from megamm.data.images_dali import DaliLoader

    loader = DaliLoader(config, image_size, training)
    picture = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(picture, "JPEG")
    loader.run([picture.getvalue()], [plan(config, image_size, False, 8, 8, 0)])
    return loader


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
