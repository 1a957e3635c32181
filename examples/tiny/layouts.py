"""Data sets about the drawn digits, in the layouts in which the real ones are distributed.

Each function writes the files of one layout and returns those that `megamm prepare` reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pictures as digits
from make_data import Picture

PAIRS_PER_SHARD = 100
URL = "https://digits.example/{}"

Writer = Callable[[Path, Path, list[Picture], np.random.Generator], list[Path]]


def _write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return path


def _name(picture: Picture) -> str:
    return Path(picture.path).stem


def pairs(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """Shards of img2dataset: key.jpg, key.txt and key.json of each pair, and a parquet beside each tar."""
    import pyarrow
    from pyarrow import parquet

    shards = []
    for first in range(0, len(pictures), PAIRS_PER_SHARD):
        shard, rows = out / f"{len(shards):05d}.tar", []
        with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, picture in enumerate(pictures[first : first + PAIRS_PER_SHARD]):
                key = f"{len(shards):05d}{number:04d}"
                data = (images / picture.path).read_bytes()
                row = {
                    "url": URL.format(picture.path),
                    "caption": digits.caption(picture, rng),
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "width": digits.SIZE,
                    "height": digits.SIZE,
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
                rows.append(row)
                parts = {"jpg": data, "txt": row["caption"].encode(), "json": json.dumps(row).encode()}
                for ending, contents in parts.items():
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(contents)
                    tar.addfile(member, io.BytesIO(contents))
        parquet.write_table(pyarrow.Table.from_pylist(rows), shard.with_suffix(".parquet"))
        shards.append(shard)
    return shards


def _documents(pictures: list[Picture], rng: np.random.Generator) -> list[tuple[list[Picture], list[str]]]:
    found = []
    for first in range(len(pictures)):
        others = rng.choice(len(pictures), size=1 + first % 2, replace=False)
        shown = [pictures[first], *(pictures[i] for i in others)]
        found.append((shown, digits.document(shown, rng)))
    return found


def obelics(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """A parquet of documents whose "images" are URLs and "texts" what stands between them."""
    import pyarrow
    from pyarrow import parquet

    rows = []
    for shown, sentences in _documents(pictures, rng):
        urls = [URL.format(picture.path) for picture in shown]
        metadata = [{"src": url} for url in urls]
        rows.append(
            {
                "images": [item for url in urls for item in (url, None)],
                "metadata": json.dumps([item for about in metadata for item in (about, None)]),
                "general_metadata": json.dumps({"url": URL.format("page")}),
                "texts": [item for sentence in sentences for item in (None, sentence)],
            }
        )
    path = out / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return [path]


def mmc4(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """JSON lines of documents with the similarity of each picture to each sentence."""
    lines = []
    for number, (shown, sentences) in enumerate(_documents(pictures, rng)):
        similarity = np.full((len(shown), len(sentences)), 0.1) + 0.25 * np.eye(len(shown))
        infos = [
            {
                "face_detections": None,
                "image_name": picture.path,
                "raw_url": URL.format(picture.path),
                "matched_text_index": i,
                "matched_sim": 0.35,
            }
            for i, picture in enumerate(shown)
        ]
        document = {
            "url": URL.format(f"page-{number}"),
            "text_list": sentences,
            "image_info": infos,
            "similarity_matrix": similarity.tolist(),
            "could_have_url_duplicate": 0,
        }
        lines.append(json.dumps(document) + "\n")
    path = out / "docs_shard_0_v2.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return [path]


def llava(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """LLaVA's JSON: conversations of three turns."""
    return [_write(out / "conversations.json", digits.conversations(pictures, rng))]


def coco(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """COCO's captions."""
    listed = [{"id": i, "file_name": picture.path} for i, picture in enumerate(pictures)]
    annotations = [
        {"id": i, "image_id": i, "caption": digits.caption(picture, rng)}
        for i, picture in enumerate(pictures)
    ]
    return [_write(out / "captions_train2014.json", {"images": listed, "annotations": annotations})]


def textcaps(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """TextCaps."""
    data = [
        {"image_id": _name(picture), "caption_id": i, "caption_str": digits.caption(picture, rng)}
        for i, picture in enumerate(pictures)
    ]
    return [_write(out / "TextCaps_0.1_train.json", {"data": data})]


def vqav2(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """VQAv2 and OK-VQA: questions and annotations in files of their own."""
    questions, annotations = [], []
    for picture in pictures:
        asked, answer = digits.question(picture, rng)
        image = int(_name(picture))
        common = {"question_id": 1000 * image, "image_id": image}
        questions.append(common | {"question": asked})
        answers = [{"answer": answer, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
        annotations.append(common | {"multiple_choice_answer": answer, "answers": answers})
    return [
        _write(out / "v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions}),
        _write(out / "v2_mscoco_train2014_annotations.json", {"annotations": annotations}),
    ]


def aokvqa(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
    """A-OKVQA: choices, and the right one of them."""
    entries = []
    for picture in pictures:
        choices = [digits.make_data.WORDS[i] for i in rng.permutation(10)[:4]]
        right = digits.make_data.as_word(picture.digit)
        if right not in choices:
            choices[rng.integers(4)] = right
        entries.append(
            {
                "question_id": f"digit-{_name(picture)}",
                "image_id": int(_name(picture)),
                "question": "Which digit is shown?",
                "choices": choices,
                "correct_choice_idx": choices.index(right),
                "direct_answers": [right] * 10,
            }
        )
    return [_write(out / "aokvqa_v1p0_train.json", entries)]


def _asked(name: str, wrap: str | None, entry: Callable[[int, Picture, str, str], dict[str, Any]]) -> Writer:
    """A writer of one file with an entry for each question: a list, or a mapping's key `wrap`."""

    def write(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
        entries = [entry(i, picture, *digits.question(picture, rng)) for i, picture in enumerate(pictures)]
        return [_write(out / name, {wrap: entries} if wrap else entries)]

    return write


def _keyed(name: str, entry: Callable[[Picture, str, str], dict[str, Any]]) -> Writer:
    """A writer of one file that maps an identifier to an entry for each question."""

    def write(out: Path, images: Path, pictures: list[Picture], rng: np.random.Generator) -> list[Path]:
        entries = {_name(p): entry(p, *digits.question(p, rng)) for p in pictures}
        return [_write(out / name, entries)]

    return write


# format of `megamm prepare` -> its writer
LAYOUTS: dict[str, Writer] = {
    "webdataset": pairs,
    "obelics": obelics,
    "mmc4": mmc4,
    "llava": llava,
    "coco": coco,
    "textcaps": textcaps,
    "vqav2": vqav2,
    "okvqa": vqav2,
    "aokvqa": aokvqa,
    "textvqa": _asked(
        "TextVQA_0.5.1_train.json",
        "data",
        lambda i, p, q, a: {"question_id": i, "question": q, "image_id": _name(p), "answers": [a] * 10},
    ),
    "vizwiz": _asked(
        "train.json",
        None,
        lambda i, p, q, a: {
            "image": p.path,
            "question": q,
            "answers": [{"answer": a, "answer_confidence": "yes"}] * 10,
            "answer_type": "other",
            "answerable": 1,
        },
    ),
    "stvqa": _asked(
        "train_task_3.json",
        "data",
        lambda i, p, q, a: {"file_path": p.path, "question": q, "answers": [a], "question_id": i},
    ),
    "docvqa": _asked(
        "train_v1.0.json",
        "data",
        lambda i, p, q, a: {"questionId": i, "question": q, "image": p.path, "answers": [a]},
    ),
    "gqa": _keyed(
        "train_balanced_questions.json",
        lambda p, q, a: {"imageId": _name(p), "question": q, "answer": a, "fullAnswer": f"It is {a}."},
    ),
    "ocrvqa": _keyed(
        "dataset.json",
        lambda p, q, a: {"imageURL": URL.format(p.path), "questions": [q], "answers": [a], "split": 1},
    ),
}
