"""Small versions of pictures for HTML pages."""

from __future__ import annotations

import base64
import io

from megamm.data.image_header import ImageError, open_image

SIZE = 400  # longer edge in pixels; shown at half of it, for fine screens
QUALITY = 80


def thumbnail(data: bytes, max_pixels: int) -> tuple[str, tuple[int, int]]:
    """A small JPEG of an encoded image as a data URI, and the size of the image.

    Raises:
        ImageError: it cannot be used.
    """
    with open_image(data, max_pixels) as picture:
        size = picture.size
        picture.draft("RGB", (SIZE, SIZE))  # JPEG: decodes at a fraction of the size
        from megamm.data.images_pillow import to_rgb

        try:
            small = to_rgb(picture)
            small.thumbnail((SIZE, SIZE))
        except ImageError:
            raise
        except Exception as error:  # decoders meet damaged bytes with exceptions of any kind
            raise ImageError(f"cannot be decoded ({error})") from None
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode(), size
