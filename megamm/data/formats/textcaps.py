"""TextCaps 0.1: {"data": [{"image_id", "caption_str", ...}]}, an entry for every caption."""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.fields import Fields
from megamm.data.formats.records import RecordFormat, captioned


class TextCaps(RecordFormat):
    """Images are those of TextVQA: "<image_id>.jpg", also in "train_images/"."""

    key = "data"

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        image = entry.identifier("image_id")
        key = entry.identifier("caption_id") if "caption_id" in entry.entry else f"{image}#{position}"
        names = (f"{image}.jpg", f"train_images/{image}.jpg")
        return captioned(key, position, names, entry.text_or_none("caption_str"))
