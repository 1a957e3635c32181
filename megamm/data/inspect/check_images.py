"""What can be wrong with one image: gone, changed, or nothing that training could use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Optional

from PIL import Image

from megamm.data.image_geometry import plan
from megamm.data.image_header import ImageError, open_image
from megamm.data.indexed import PreparedDataset
from megamm.data.inspect.check_samples import reason_of
from megamm.data.inspect.limits import Limits

Depth = Literal["decode", "header", "none"]
CRASH = "ends the process that reads it"


class Looked(NamedTuple):
    """Images that were looked at, and the (image, reason) of those that cannot be used."""

    images: int
    bad: list[tuple[int, str]]


def start_looking(directory: Path, depth: Depth, limits: Limits) -> Callable[[Sequence[int]], Looked]:
    """The work of a process that looks at images."""
    return ImageCheck(PreparedDataset(directory, verify=False), depth, limits).look


def crashed(image: int) -> Looked:
    """What is said of an image that ended a process."""
    return Looked(1, [(image, CRASH)])


class ImageCheck:
    """Reads images, compares them with their checksum, and opens or decodes them as training does."""

    def __init__(self, dataset: PreparedDataset, depth: Depth, limits: Limits) -> None:
        self._dataset, self._depth, self._limits = dataset, depth, limits
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, limits.image.max_pixels)

    def look(self, images: Sequence[int]) -> Looked:
        """Which of `images` cannot be used."""
        reasons = ((image, self.reason(image)) for image in images)
        return Looked(len(images), [(image, reason) for image, reason in reasons if reason is not None])

    def reason(self, image: int) -> Optional[str]:
        """Why an image cannot be used; None: it can."""
        try:
            data = self._dataset.read_image(image)
            with open_image(data, self._limits.image.max_pixels) as picture:
                if self._limits.image_size is not None:
                    size = self._limits.image_size
                    plan(self._limits.image, size, False, picture.width, picture.height, 0)
                if self._depth == "decode":
                    self._decode(picture)
        except Exception as error:  # readers meet damaged bytes with exceptions of any kind
            return reason_of(error)
        return None

    def _decode(self, picture: Image.Image) -> None:
        from megamm.data.images_pillow import to_rgb  # which imports torch

        try:
            picture.draft(None, (1, 1))  # JPEG: all of it is read, but turned into fewer pixels
            to_rgb(picture)
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"cannot be decoded ({error})") from None
