"""COCO's captions, and those of VizWiz-Captions and others in the same layout.

{"images": [{"id", "file_name", ...}], "annotations": [{"id", "image_id", "caption"}]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats.base import Chunk, Format
from megamm.data.formats.fields import Fields, is_name
from megamm.data.formats.lookup import joined_chunks, lookup
from megamm.data.formats.records import captioned
from megamm.data.json_entries import iter_entries


class Coco(Format):
    """One conversation for every caption.

    The image is "file_name", also in the folder that "coco_url" names. Captions that VizWiz marks as
    rejected are left out, as those whose image the file does not list.
    """

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        for number, path in enumerate(sources):
            with lookup() as names:  # ids may mean other images in another file
                names.put(_images(path))
                yield from joined_chunks(path, number, "annotations", "image_id", names)

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        first, pairs = chunk.payload
        for position, (annotation, names) in enumerate(pairs, start=first):
            entry = Fields(annotation, f"{chunk.source}: entry {position + 1}")
            key = entry.identifier("id") if "id" in entry.entry else str(position)
            if names is None:
                yield Skipped(key, position, 'its image is not among the "images" of the file')
            elif entry.entry.get("is_rejected") is True:
                yield Skipped(key, position, "the caption is marked as rejected")
            else:
                yield captioned(key, position, tuple(json.loads(names)), entry.text_or_none("caption"))


def _images(path: Path) -> Iterator[tuple[str, str]]:
    for position, value in enumerate(iter_entries(path, "images")):
        entry = Fields(value, f"{path}: image {position + 1}")
        name, url = entry.name("file_name"), entry.entry.get("coco_url")
        names = [name]
        if is_name(url):
            names.append("/".join([*url.split("/")[-2:-1], name]))
        yield entry.identifier("id"), json.dumps(names)
