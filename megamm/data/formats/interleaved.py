"""What OBELICS and MMC4 share: a document is texts with images between them.

The rules are those of OpenFlamingo's loader, which InfiMM uses too; the options `max_images` and
`keep_single_image` set their numbers.
"""

from __future__ import annotations

import hashlib

from megamm.data.conversation import Conversation, ImageRef, Skipped
from megamm.data.formats.base import FormatOptions
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN


def document(
    key: str, position: int, parts: list[tuple[ImageRef | None, str]], options: FormatOptions, between: str
) -> Conversation | Skipped:
    """The document made of `parts`, each an image or none and the text that follows it.

    Of its images the first `max_images` stay. Of the documents with one image a share of 1 -
    `keep_single_image` is left out, chosen by a hash of the text.

    Args:
        between: stands between two parts where the second has no image.
    """
    text = ""
    images: list[ImageRef] = []
    for image, words in parts:
        if image is not None and len(images) < options.max_images:
            images.append(image)
            text += f" {IMAGE_TOKEN}{words}" if text else IMAGE_TOKEN + words
        elif words:
            text += between + words if text and not text.endswith(IMAGE_TOKEN) else words
    if not images:
        return Skipped(key, position, "has no image that belongs to a text")
    if not text.replace(IMAGE_TOKEN, "").strip():
        return Skipped(key, position, "has no text")
    if len(images) == 1 and _share(text) >= options.keep_single_image:
        return Skipped(key, position, "has one image only")
    return Conversation(key, position, images, [Turn("document", text)])


def url_names(url: str) -> tuple[str, ...]:
    """The names under which the image of a URL may lie: the URL, and the last part of its path."""
    base = url.partition("#")[0].partition("?")[0].rpartition("/")[2]
    return (url, base) if base and base != url else (url,)


def _share(text: str) -> float:
    """A number in [0, 1) that only the text decides."""
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / (1 << 48)
