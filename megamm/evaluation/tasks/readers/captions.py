"""Captions: COCO's own layout (also NoCaps'), and Karpathy's splits of COCO and Flickr30k.

{"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption"}]} and
{"images": [{"filename", "split", "sentences": [{"raw"}], "cocoid" or "imgid", ...}]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megamm.data.formats.fields import Fields, is_name
from megamm.data.json_entries import find_key
from megamm.errors import InputError
from megamm.evaluation.tasks.files import entries, fields, named_or_found, roots
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Folders

FILES = {
    "coco_caption": (
        "dataset_coco.json",
        "captions_val2014.json",
        "captions_val2017.json",
        "image_info_test*.json",
    ),
    "flickr30k": ("dataset_flickr30k.json", "*flickr30k*.json"),
    "nocaps": ("nocaps_val_4500_captions.json", "nocaps_val_image_info.json", "nocaps_test_image_info.json"),
}
_BELOW = (
    *("images", "val2014", "train2014", "val2017", "train2017", "test2014", "test2015"),
    *("flickr30k-images", "flickr30k_images", "val", "validation", "test"),
)


class Captions:
    """The pictures of a benchmark, each with all its captions. One picture is one item, whatever the number
    of its captions, as the evaluators count. A demonstration shows the first caption.

    Args:
        task: whose file names are looked for in a folder.
    """

    def __init__(self, task: str) -> None:
        self._task = task

    def __call__(self, data: Sequence[Path], images: Path | None, split: str) -> Iterator[Item]:
        folders = Folders(roots(data, images), _BELOW)
        for path in named_or_found(data, FILES[self._task]):
            yield from _items(path, folders, split)


def _items(path: Path, folders: Folders, split: str) -> Iterator[Item]:
    captions: dict[str, list[str]] | None = None
    count = 0
    for entry in entries(path, "images", "image"):
        if "sentences" in entry.entry:
            if entry.text("split") == split:
                yield _of_karpathy(entry, folders)
                count += 1
            continue
        if captions is None:
            captions = _captions(path)
        yield _of_coco(entry, folders, captions)
        count += 1
    if not count:
        raise InputError(f'{path}: has no images of the split "{split}"; give a file that holds some')


def _captions(path: Path) -> dict[str, list[str]]:
    """The captions of each image; empty for a split whose captions are not published."""
    found: dict[str, list[str]] = {}
    if find_key(path, ("annotations",)) is None:
        return found
    for entry in entries(path, "annotations", "annotation"):
        if entry.entry.get("is_rejected") is not True:
            found.setdefault(entry.identifier("image_id"), []).append(entry.text("caption"))
    return found


def _of_coco(entry: Fields, folders: Folders, captions: dict[str, list[str]]) -> Item:
    name, url = entry.name("file_name"), entry.entry.get("coco_url")
    names = [name]
    if is_name(url):
        names.append("/".join([*url.split("/")[-2:-1], name]))
    if "open_images_id" in entry.entry:  # NoCaps: pictures fetched from Open Images bear its ids
        names.append(f"{entry.name('open_images_id')}.jpg")
    key = entry.identifier("id")
    domain = entry.entry.get("domain")
    extra = {"split": entry.text("domain")} if domain is not None else {}
    return _item(key, entry.entry["id"], folders, names, captions.get(key, []), extra)


def _of_karpathy(entry: Fields, folders: Folders) -> Item:
    name = entry.name("filename")
    names = [name]
    if is_name(folder := entry.entry.get("filepath")):
        names.insert(0, f"{folder}/{name}")
    said = [fields(each, entry.where).text("raw") for each in entry.listed("sentences")]
    if "cocoid" in entry.entry:
        return _item(entry.identifier("cocoid"), entry.entry["cocoid"], folders, names, said, {})
    key = Path(name).stem
    return _item(key, int(key) if key.isdecimal() else key, folders, names, said, {})


def _item(
    key: str, image_id: Any, folders: Folders, names: list[str], captions: list[str], extra: dict[str, Any]
) -> Item:
    return Item(
        id=key,
        kind="caption",
        images=(folders.picture(*names),),
        answer=captions[0] if captions else "",
        reference={"references": captions, **extra} if captions else None,
        submission={"image_id": image_id},
    )
