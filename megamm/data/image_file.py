"""One image file as a tensor, for inference and evaluation."""

from __future__ import annotations

from pathlib import Path

import torch

from megamm.data.image_header import check_length
from megamm.data.images import ImageError, ImageLoader
from megamm.errors import InputError
from megamm.whole_files import read_whole


def load_image_file(path: str | Path, image_loader: ImageLoader) -> torch.Tensor:
    """The image at `path`: [3, image_size, image_size] float32, normalised.

    Raises:
        InputError: the file is missing or no usable image.
    """
    try:
        check_length(Path(path).stat().st_size)
        (result,) = image_loader.load([read_whole(path)], [0])
    except ImageError as error:
        result = error
    except OSError as error:
        raise InputError(f"{path}: the image cannot be read ({error.strerror}); give an image file") from None
    if isinstance(result, ImageError):
        raise InputError(f"{path}: {result}; give another image") from None
    return result
