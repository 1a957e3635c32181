"""One picture as a tensor, for inference and evaluation."""

from __future__ import annotations

from pathlib import Path

import torch

from megamm.data.image_header import check_length
from megamm.data.images import ImageError, ImageLoader
from megamm.errors import InputError
from megamm.whole_files import read_whole


def load_image(picture: str | Path | bytes, image_loader: ImageLoader) -> torch.Tensor:
    """A picture as [3, image_size, image_size] float32, normalised.

    Args:
        picture: an image file, or what is in one.
    Raises:
        InputError: the file is missing or no usable image.
    """
    name = "the picture" if isinstance(picture, bytes) else picture
    try:
        if isinstance(picture, bytes):
            check_length(len(picture))
            data = picture
        else:
            check_length(Path(picture).stat().st_size)
            data = read_whole(picture)
        (result,) = image_loader.load([data], [0])
    except ImageError as error:
        result = error
    except OSError as error:
        raise InputError(f"{name}: the image cannot be read ({error.strerror}); give an image file") from None
    if isinstance(result, ImageError):
        raise InputError(f"{name}: {result}; give another image") from None
    return result
