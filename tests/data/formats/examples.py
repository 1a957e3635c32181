"""A small data set in the layout of every source format: EXAMPLES[name](folder) writes it.

The layouts are those in which the data sets are distributed, with the keys that readers do not use left in
where they matter; texts and pictures are made here.
"""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megamm.data.formats import FormatOptions
from megamm.data.templates import Turn
from tests.data.formats import examples_vqa as vqa
from tests.data.formats.example import (
    SHORT,
    Example,
    Wanted,
    caption,
    files,
    heavy,
    jpeg,
    qa,
    tar,
    write_json,
    write_lines,
)


def llava(root: Path) -> Example:
    images = files(root / "images", {"coco/1.jpg": jpeg(1), "coco/2.jpg": jpeg(2)})
    chat = [{"from": "human", "value": f"<image>\n{SHORT}"}, {"from": "gpt", "value": "A cup."}]
    two = [{"from": "human", "value": "Is <image> or <image> darker?"}, {"from": "gpt", "value": "The last."}]
    plain = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    entries = [
        {"id": "000001", "image": "coco/1.jpg", "conversations": chat},
        {"id": "000002", "image": ["coco/1.jpg", "coco/2.jpg"], "conversations": two},
        {"id": "000003", "conversations": plain},
    ]
    sources = [write_json(root / "a.json", entries[:2]), write_lines(root / "b.jsonl", entries[2:])]
    wanted = [
        Wanted([jpeg(1)], qa(f"<image>\n{SHORT}", "A cup.")),
        Wanted([jpeg(1), jpeg(2)], qa("Is <image> or <image> darker?", "The last.")),
        Wanted([], qa("Hello?", "Hello.")),
    ]
    return Example("llava", sources, [images], wanted)


def sharegpt(root: Path) -> Example:
    images = files(root / "images", {"1.jpg": jpeg(1), "2.jpg": jpeg(2), "web.png": jpeg(3)})
    answer = {"role": "assistant", "content": "A cup."}
    shared = [
        {
            "id": "chat_0",
            "conversations": [
                {"from": "gpt", "value": "Welcome."},
                {"from": "human", "value": "Hello?"},
                {"from": "chatgpt", "value": "Hello."},
                {"from": "human", "value": "More?"},
            ],
        },
        {
            "id": "chat_1",
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "b"}],
        },
    ]
    messages = [
        {"messages": [{"role": "user", "content": f"<image>{SHORT}"}, answer], "images": ["1.jpg"]},
        {"messages": [{"role": "user", "content": SHORT}, answer], "images": ["1.jpg", {"path": "2.jpg"}]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": f"{SHORT} Not <image>."}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
            ],
            "images": ["2.jpg"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "See "},
                        {"type": "image_url", "image_url": {"url": "https://a.b/c/web.png?w=9"}},
                    ],
                },
                answer,
            ]
        },
        {"messages": [{"role": "user", "content": "Time?"}, {"role": "tool", "content": "12"}, answer]},
    ]
    sources = [write_json(root / "shared.json", shared), write_lines(root / "messages.jsonl", messages)]
    wanted = [
        Wanted([], qa("Hello?", "Hello.")),
        Wanted([jpeg(1)], qa(f"<image>{SHORT}", "A cup.")),
        Wanted([jpeg(1), jpeg(2)], qa(f"<image>\n<image>\n{SHORT}", "A cup.")),
        Wanted([jpeg(2)], [Turn("system", "Be brief."), *qa(f"<image>\n{SHORT} Not .", "A cup.")]),
        Wanted([jpeg(3)], qa("See <image>\n", "A cup.")),
    ]
    return Example("sharegpt", sources, [images], wanted, ["1 <image> placeholders, 0 images", "'tool'"])


def webdataset(root: Path) -> Example:
    def about(key: str, caption: Any, status: str = "success") -> bytes:
        return json.dumps({"key": key, "caption": caption, "status": status, "url": "https://a.b"}).encode()

    first = tar(
        root / "00000.tar",
        {
            "000000000.jpg": jpeg(1),
            "000000000.json": about("000000000", "unused"),
            "000000000.txt": b" A red cup with <image> on it\n",
            "000000001.json": about("000000001", "A blue plate"),
            "000000001.webp": jpeg(2),
            "000000002.json": about("000000002", "gone", "failed_to_download"),
            "000000002.jpg": jpeg(3),
            "000000003.txt": b"no image",
            "000000004.jpg": jpeg(3),
            "000000005.jpg": jpeg(3),
            "000000005.json": about("000000005", None),
            "000000006.exe": jpeg(3),
            "000000006.txt": b"a program",
        },
    )
    second = tar(root / "00001.tar", {"a/000010000.png": jpeg(4), "a/000010000.txt": "Ein Löffel".encode()})
    wanted = [
        caption(jpeg(1), "A red cup with  on it"),
        caption(jpeg(2), "A blue plate"),
        caption(jpeg(4), "Ein Löffel"),
    ]
    reasons = ["fetched", "no image", "no caption", "no caption", "no image"]
    return Example("webdataset", [first, second], [], wanted, reasons)


def obelics(root: Path) -> Example:
    import pyarrow
    from pyarrow import parquet

    images = files(root / "images", {"a.jpg": jpeg(1), "b.jpg": jpeg(2), "c.jpg": jpeg(3)})
    a, b, c = (f"https://site.org/pictures/{name}.jpg" for name in "abc")
    rows = {
        "images": [[a, None, b, None, None], [None, None], [c, None], [a], [a, b]],
        "metadata": ["[]"] * 5,
        "general_metadata": ["{}"] * 5,
        "texts": [
            [None, "A heading", None, "A text.\n\nAnd <image> more.", "The end."],
            ["Only", "text"],
            [None, "One"],
            [None],
            [None],
        ],
    }
    path = root / "train-00000.parquet"
    parquet.write_table(pyarrow.table(rows), path, row_group_size=2)
    wanted = [
        Wanted(
            [jpeg(1), jpeg(2)],
            [Turn("document", "<image>A heading <image>A text.\n\nAnd  more.\n\nThe end.")],
        ),
        Wanted([jpeg(3)], [Turn("document", "<image>One")]),
    ]
    options = FormatOptions(keep_single_image=1.0)
    reasons = ["no image", "no text", "not as many images as texts"]
    return Example("obelics", [path], [images], wanted, reasons, options)


def _mmc4(infos: list[dict[str, Any]], similarity: list[list[float]]) -> dict[str, Any]:
    return {
        "url": "https://site.org/page",
        "text_list": ["A cup.", "A plate.", "Nothing <image>."],
        "image_info": infos,
        "similarity_matrix": similarity,
        "could_have_url_duplicate": 0,
    }


def mmc4(root: Path) -> Example:
    """Both images match the first sentence best; one to one, the second image has to go to the second."""
    images = files(root / "images", {"x.jpg": jpeg(1), "y.jpg": jpeg(2), "z.png": jpeg(3)})
    infos = [
        {"image_name": "x.jpg", "raw_url": "https://a.b/x", "matched_text_index": 0, "matched_sim": 0.9},
        {"image_name": "gone.jpg", "raw_url": "https://a.b/y.jpg?s=1"},
        {"raw_url": "https://a.b/z.png"},
    ]
    good = _mmc4(infos, [[0.9, 0.3, 0.1], [0.8, 0.5, 0.1], [0.1, 0.2, 0.23]])
    low = _mmc4(infos[:1], [[0.2, 0.1, 0.1]])
    odd = _mmc4(infos[:1], [[0.2, 0.1]])
    lines = write_lines(root / "docs.jsonl", [good, low, odd])
    packed = root / "docs_shard_1.jsonl.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("docs_shard_1.jsonl", json.dumps(_mmc4(infos[:1], [[0.1, 0.1, 0.7]])) + "\n")
    wanted = [
        Wanted([jpeg(1), jpeg(2)], [Turn("document", "<image>A cup. <image>A plate. Nothing .")]),
        Wanted([jpeg(1)], [Turn("document", "A cup. A plate. <image>Nothing .")]),
    ]
    options = FormatOptions(keep_single_image=1.0)
    return Example("mmc4", [lines, packed], [images], wanted, ["no image that", "text_list"], options)


def mmc4_tar(root: Path) -> Example:
    """The image that is too small leaves its sentence to the other."""
    pictures = [heavy(1), jpeg(2), heavy(3)]
    infos = [
        {"image_name": f"{i}.png", "image_base64": base64.b64encode(p).decode()}
        for i, p in enumerate(pictures)
    ]
    page = _mmc4(infos, [[0.1, 0.3, 0.9], [0.95, 0.3, 0.1], [0.8, 0.1, 0.1]])
    only = _mmc4(infos[1:2], [[0.9, 0.1, 0.1]])
    source = tar(root / "000.tar", {f"{i}.json": json.dumps(d).encode() for i, d in enumerate([page, only])})
    wanted = [
        Wanted([heavy(3), heavy(1)], [Turn("document", "<image>A cup. A plate. <image>Nothing .")]),
    ]
    return Example("mmc4", [source], [], wanted, ["no image that"])


def coco(root: Path) -> Example:
    name = "COCO_val2014_000000000007.jpg"
    images = files(root / "images", {"train2017/000000000005.jpg": jpeg(1), name: jpeg(2)})
    data = {
        "info": {"year": 2014},
        "annotations": [
            {"image_id": 5, "id": 100, "caption": "A cup on a table. "},
            {"image_id": 7, "id": 101, "caption": "Two plates."},
            {"image_id": 9, "id": 102, "caption": "Not listed."},
            {"image_id": 5, "id": 103, "caption": "A red cup."},
        ],
        "licenses": [],
        "images": [
            {
                "id": 5,
                "file_name": "000000000005.jpg",
                "coco_url": "http://images.cocodataset.org/train2017/000000000005.jpg",
            },
            {"id": 7, "file_name": name, "height": 30},
        ],
    }
    wanted = [
        caption(jpeg(1), "A cup on a table."),
        caption(jpeg(2), "Two plates."),
        caption(jpeg(1), "A red cup."),
    ]
    return Example("coco", [write_json(root / "captions.json", data)], [images], wanted, ["not among"])


def vizwiz_captions(root: Path) -> Example:
    images = files(root / "images", {"VizWiz_train_00000000.jpg": jpeg(1)})
    spam = {"caption": "asdf", "image_id": 0, "is_precanned": False, "is_rejected": True, "id": 1}
    data = {
        "images": [{"file_name": "VizWiz_train_00000000.jpg", "id": 0, "text_detected": True}],
        "annotations": [spam, spam | {"caption": "A can.", "is_rejected": False, "id": 2}],
    }
    wanted = [caption(jpeg(1), "A can.")]
    return Example("coco", [write_json(root / "train.json", data)], [images], wanted, ["rejected"])


def text(root: Path) -> Example:
    (root / "book.txt").write_text("Chapter one.\n\nIt was <image> late.\n", encoding="utf-8")
    entries = [{"text": "A page.", "url": "https://a.b"}, {"text": " \n"}, {"id": "p3", "text": "Another."}]
    sources = [root / "book.txt", write_lines(root / "web.jsonl", entries)]
    documents = ["Chapter one.\n\nIt was  late.\n", "A page.", "Another."]
    return Example("text", sources, [], [Wanted([], [Turn("document", d)]) for d in documents], ["no text"])


EXAMPLES: dict[str, Callable[[Path], Example]] = {
    function.__name__: function
    for function in (
        *(llava, sharegpt, webdataset, obelics, mmc4, mmc4_tar, coco, vizwiz_captions, text),
        *(vqa.vqav2, vqa.okvqa, vqa.textvqa, vqa.textcaps, vqa.vizwiz, vqa.aokvqa, vqa.aokvqa_direct),
        *(vqa.gqa, vqa.ocrvqa, vqa.stvqa, vqa.docvqa, vqa.scienceqa),
    )
}
