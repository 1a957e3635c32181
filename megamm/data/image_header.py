"""What can be known of an encoded image without decoding it, and the refusal of dangerous ones."""

from __future__ import annotations

import io
import warnings
from typing import NamedTuple

from PIL import Image

# Readers that stay within the bytes they are given (others run programs or follow references).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_BYTES = 1 << 28  # of an encoded image: 64 million pixels of four bytes each, not compressed
Image.init()  # registers the readers that Pillow loads late

# Pillow warns of pictures with very many pixels; here that is a reason to refuse them.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageError(Exception):
    """An image that cannot be used, and why; handed on as a value, since a bad image stops nothing."""


class Header(NamedTuple):
    """Size in pixels, Pillow's name of the format and of the pixel layout."""

    width: int
    height: int
    format: str
    mode: str


def check_length(length: int) -> None:
    """Raises ImageError if no image has so many bytes; to be asked before they are read."""
    if not length:
        raise ImageError("the file is empty")
    if length > MAX_BYTES:
        raise ImageError(f"has {length} bytes, more than {MAX_BYTES}")


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """The image in `data`, its header read but no pixel decoded.

    Raises:
        ImageError: not an image, more than MAX_BYTES bytes or more than `max_pixels` pixels.
    """
    check_length(len(data))
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"has more than {max_pixels} pixels") from None
    except Image.UnidentifiedImageError:
        raise ImageError("is not an image in a known format") from None
    except Exception as error:  # readers meet hostile bytes with exceptions of any kind
        raise ImageError(f"has a damaged header ({error})") from None
    if image.width * image.height > max_pixels:
        raise ImageError(f"has {image.width} x {image.height} pixels, more than {max_pixels}")
    return image


def read_header(data: bytes, max_pixels: int) -> Header:
    """Size and format of an encoded image; raises ImageError as `open_image` does."""
    with open_image(data, max_pixels) as image:
        return Header(image.width, image.height, image.format or "", image.mode)
