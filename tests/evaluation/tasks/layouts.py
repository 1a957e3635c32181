"""Tiny instances of the benchmarks, in the layouts in which they are distributed, with real pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


def picture(number: int, kind: str = "JPEG") -> bytes:
    """An encoded picture whose width and grey value tell its number."""
    file = io.BytesIO()
    Image.new("RGB", (8 + number, 8), (number * 20,) * 3).save(file, kind)
    return file.getvalue()


def number_of(data: bytes) -> int:
    """The number of a picture."""
    with Image.open(io.BytesIO(data)) as image:
        return image.width - 8


def put(path: Path, content: Any) -> Path:
    """Write bytes, text, or a value as JSON; makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def ten(*answers: str) -> list[str]:
    """Ten answers, the last one repeated."""
    return [*answers, *answers[-1:] * (10 - len(answers))]


def coco_caption(root: Path) -> Path:
    """COCO's own captions of two pictures, one of them below the folder of its split."""
    put(root / "val2014" / "COCO_val2014_000000000042.jpg", picture(1))
    put(root / "val2014" / "COCO_val2014_000000000073.jpg", picture(2))
    images = [
        {"id": 42, "file_name": "COCO_val2014_000000000042.jpg", "coco_url": "http://x/val2014/a.jpg"},
        {"id": 73, "file_name": "COCO_val2014_000000000073.jpg"},
    ]
    captions = [
        {"id": 1, "image_id": 73, "caption": "A motorcycle parked in a garage."},
        {"id": 2, "image_id": 42, "caption": "A dog on a rug ."},
        {"id": 3, "image_id": 42, "caption": "A small dog lies next to shoes"},
    ]
    put(root / "annotations" / "captions_val2014.json", {"images": images, "annotations": captions})
    return root


def karpathy(root: Path, coco: bool) -> Path:
    """Karpathy's split of COCO or Flickr30k: two pictures to test, three to train with."""
    entries = []
    for number, split in enumerate(["train", "test", "train", "val", "test", "train"]):
        name = f"COCO_val2014_{number:012d}.jpg" if coco else f"{1000 + number}.jpg"
        said = [{"raw": f" caption {number} of {which}. ", "tokens": []} for which in ("one", "two")]
        entry = {"filename": name, "split": split, "sentences": said, "imgid": number}
        if coco:
            entry |= {"filepath": "val2014", "cocoid": 500 + number}
        put(root / ("val2014" if coco else "flickr30k-images") / name, picture(number))
        entries.append(entry)
    name = "dataset_coco.json" if coco else "dataset_flickr30k.json"
    return put(root / name, {"dataset": "coco" if coco else "flickr30k", "images": entries})


def nocaps(root: Path) -> Path:
    put(root / "val" / "0013ea2087020901.jpg", picture(1))
    put(root / "images" / "00a2b3c4d5e6f708.jpg", picture(2))
    images = [
        {"id": 0, "open_images_id": "0013ea2087020901", "file_name": "0013ea2087020901.jpg"},
        {"id": 1, "open_images_id": "00a2b3c4d5e6f708", "file_name": "other.jpg"},
    ]
    images = [
        image | {"domain": domain} for image, domain in zip(images, ("in-domain", "out-domain"), strict=True)
    ]
    captions = [
        {"id": n, "image_id": n // 2, "caption": f"A baby number {n} stands in front of a house"}
        for n in range(4)
    ]
    put(root / "nocaps_val_4500_captions.json", {"images": images, "annotations": captions})
    return root


def vqa(root: Path, prefix: str = "v2_", split: str = "val2014", count: int = 3) -> Path:
    """Ids of training questions begin at 6000."""
    questions, annotations = [], []
    first = 6000 if "train" in split else 1000
    for n in range(count):
        put(root / split / f"COCO_{split}_{n:012d}.jpg", picture(n))
        questions.append({"question_id": first + n, "image_id": n, "question": f"How many of {n}?"})
        given = [
            {"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(ten("one", "2"))
        ]
        annotations.append(
            {"question_id": first + n, "image_id": n, "answer_type": "number", "question_type": "how many"}
            | {"multiple_choice_answer": "2", "answers": given}
        )
    put(root / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"info": {}, "questions": questions})
    put(root / f"{prefix}mscoco_{split}_annotations.json", {"annotations": annotations[::-1]})
    return root


def textvqa(root: Path) -> Path:
    entries, words = [], []
    for n, name in enumerate(["0054c91397f2fe05", "005635e119b9f32f"]):
        put(root / "train_images" / f"{name}.jpg", picture(n))
        entries.append(
            {
                "question_id": 34602 + n,
                "image_id": name,
                "question": "what is the brand?",
                "answers": ten("nous"),
            }
        )
        words.append(
            {"image_id": name, "ocr_tokens": ["nous", "les", "gosses"] if n == 0 else [], "ocr_info": []}
        )
    put(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries})
    put(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})
    return root


def vizwiz(root: Path) -> Path:
    entries = []
    for n in range(2):
        name = f"VizWiz_val_{n:08d}.jpg"
        put(root / "val" / name, picture(n))
        given = [{"answer": a, "answer_confidence": "yes"} for a in ten("unanswerable", "basil")]
        entries.append({"image": name, "question": "What is this?", "answers": given, "answer_type": "other"})
    put(root / "Annotations" / "val.json", entries)
    return root


def gqa(root: Path) -> Path:
    put(root / "images" / "n161313.jpg", picture(1))
    types = {"detailed": "existAttrTrue", "semantic": "attr", "structural": "verify"}
    entry = {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", "types": types}
    other = entry | {
        "question": "What is on the left?",
        "answer": "fence",
        "types": types | {"structural": "query"},
    }
    put(root / "questions1.2" / "testdev_balanced_questions.json", {"201307251": entry, "201640614": other})
    return root


def pope(root: Path) -> Path:
    for n in range(2):
        put(root / "val2014" / f"COCO_val2014_{n:012d}.jpg", picture(n))
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": 1,
                "image": "COCO_val2014_000000000000.jpg",
                "text": "Is there a bear?",
                "label": "yes",
            },
            {
                "question_id": 2,
                "image": "COCO_val2014_000000000001.jpg",
                "text": "Is there a cup?",
                "label": "no",
            },
        ]
        put(root / f"coco_pope_{split}.json", lines(*rows))
    return root


def mme(root: Path) -> Path:
    """One task in each layout of the release."""
    asked = (
        "Is this an artwork? Please answer yes or no.\tYes\nIs this a photo? Please answer yes or no.\tNo\n"
    )
    put(root / "artwork" / "images" / "10002.jpg", picture(1))
    put(root / "artwork" / "questions_answers_YN" / "10002.txt", asked)
    put(root / "code_reasoning" / "0020.png", picture(2, "PNG"))
    put(root / "code_reasoning" / "0020.txt", asked)
    return root


def mmbench(root: Path) -> Path:
    """Two questions with their rotations; the second picture is named by the index of its first row."""
    columns = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "l2-category",
        "split",
    ]
    image = base64.b64encode(picture(1)).decode()
    other = base64.b64encode(picture(2)).decode()
    rest = ["identity", image, "finegrained", "dev"]
    rows = [
        [7, 'Who is "he"?', "He sings.", "Ann", "Bob", "", "", "B", *rest],
        [1000007, 'Who is "he"?', "He sings.", "Bob", "Ann", "", "", "A", *rest],
        [9, "Which\nword?", "nan", "up", "down", "left", "right", "C", "words", other, "coarse", "dev"],
        [1000009, "Which\nword?", "", "right", "up", "down", "left", "D", "words", "9", "coarse", "dev"],
    ]
    file = io.StringIO()
    table = csv.writer(file, delimiter="\t", lineterminator="\n")
    table.writerows([columns, *rows])
    put(root / "mmbench_dev_en_20231003.tsv", file.getvalue())
    return root


def scienceqa(root: Path) -> Path:
    def problem(question: str, split: str, image: str | None, hint: str = "") -> dict[str, Any]:
        named = {"question": question, "choices": ["stone", "wood"], "answer": 1, "hint": hint}
        return named | {"image": image, "split": split, "lecture": "", "grade": "grade2"}

    problems = {
        "1": problem("What is it?", "train", "image.png"),
        "3": problem("Which floats?", "test", "image.png", "A pond."),
        "4": problem("What is heavy?", "test", None),
        "5": problem("Which burns?", "test", "image.png"),
    }
    put(root / "problems.json", problems)
    put(root / "pid_splits.json", {"train": ["1"], "test": ["5", "4", "3"]})
    for n, place in enumerate(["train/1", "test/3", "test/5"]):
        put(root / "images" / place / "image.png", picture(n, "PNG"))
    return root


def mmmu_rows() -> list[dict[str, Any]]:
    """A question with two pictures in words and options, one without a place for its picture, an open one."""
    return [
        {
            **{"id": "validation_Art_1", "question": "Compare <image 2> with <image 1>.", "answer": "B"},
            **{"options": "['like <image 1>', \"it's new\"]", "question_type": "multiple-choice"},
            **{"image_1": picture(1, "PNG"), "image_2": picture(2, "PNG")},
        },
        {
            **{"id": "validation_Art_2", "question": "Who painted it?", "answer": "A"},
            **{"options": "['Monet', 'Manet', 'Ernst']", "question_type": "multiple-choice"},
            **{"image_1": picture(3, "PNG"), "image_2": None},
        },
        {
            **{"id": "validation_Math_1", "question": "How long is <image 1>?", "answer": "['12', '12.0']"},
            **{"options": "[]", "question_type": "open", "image_1": picture(4, "PNG"), "image_2": None},
        },
    ]


def mmmu_parquet(root: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    for subject in ("Art", "Math"):
        rows = [row for row in mmmu_rows() if subject in row["id"]]
        for row in rows:
            for key in ("image_1", "image_2"):
                if row[key] is not None:
                    row[key] = {"bytes": row[key], "path": f"{row['id']}.png"}
        folder = root / subject
        folder.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "validation-00000-of-00001.parquet")
    return root


def mmmu_lines(root: Path) -> Path:
    """As JSON lines: one picture as a file, the others in base64."""
    rows = mmmu_rows()
    for row in rows:
        for key in ("image_1", "image_2"):
            if row[key] is not None:
                row[key] = {"bytes": base64.b64encode(row[key]).decode(), "path": None}
    put(root / "images" / "long.png", picture(4, "PNG"))
    rows[2]["image_1"] = "long.png"
    rows[2]["answer"] = ["12", "12.0"]
    rows[0]["options"] = ["like <image 1>", "it's new"]
    put(root / "mmmu.jsonl", lines(*rows))
    return root


# A folder of every benchmark, by the name of the task.
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "coco_caption": coco_caption,
    "flickr30k": lambda root: karpathy(root, coco=False).parent,
    "nocaps": nocaps,
    "vqav2": vqa,
    "okvqa": lambda root: vqa(root, prefix=""),
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "gqa": gqa,
    "pope": pope,
    "mme": mme,
    "mmbench": mmbench,
    "scienceqa_img": scienceqa,
    "mmmu": mmmu_parquet,
}
