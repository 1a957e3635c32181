"""Examples of questions about images with short answers, and of choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.data.formats.example import SHORT, Example, Wanted, caption, files, jpeg, qa, write_json


def _vqa(image: bytes, answer: str, question: str = SHORT, task: str = "vqa") -> Wanted:
    return Wanted([image], qa(f"<image>\n{question}", answer), task)


def _vqa_files(root: Path, extra: dict[str, Any]) -> list[Path]:
    """Annotations first, in another order than the questions."""
    questions = [
        {"image_id": image, "question": SHORT, "question_id": 10 * image}
        for image in (262148, 393225, 240323)
    ]
    answers = [
        {
            "question_type": "what is",
            "multiple_choice_answer": "plate",
            "answers": [{"answer": "cup", "answer_confidence": "yes", "answer_id": 1}],
            "image_id": 393225,
            "answer_type": "other",
            "question_id": 3932250,
        },
        {
            "answers": [
                {"answer": a, "answer_id": i} | extra for i, a in enumerate(["mug", "cup", "cup", "mug"])
            ],
            "image_id": 262148,
            "question_id": 2621480,
        },
    ]
    return [
        write_json(root / "annotations.json", {"info": {}, "annotations": answers, "data_type": "mscoco"}),
        write_json(root / "questions.json", {"task_type": "Open-Ended", "questions": questions}),
    ]


def vqav2(root: Path) -> Example:
    names = {"train2014/COCO_train2014_000000262148.jpg": jpeg(1), "COCO_val2014_000000393225.jpg": jpeg(2)}
    images = files(root / "images", names)
    wanted = [_vqa(jpeg(1), "mug"), _vqa(jpeg(2), "plate")]
    return Example("vqav2", _vqa_files(root, {}), [images], wanted, ["no annotation"])


def okvqa(root: Path) -> Example:
    images = files(root / "images", {"train2017/000000262148.jpg": jpeg(1), "000000393225.jpg": jpeg(2)})
    wanted = [_vqa(jpeg(1), "mug"), _vqa(jpeg(2), "plate")]
    return Example("okvqa", _vqa_files(root, {"raw_answer": "mugs"}), [images], wanted, ["no annotation"])


def textvqa(root: Path) -> Example:
    images = files(root / "images", {"train_images/0054c91397f2fe05.jpg": jpeg(1), "11.jpg": jpeg(2)})
    data = [
        {"question": SHORT, "image_id": "0054c91397f2fe05", "answers": ["nous les", "dakota", "dakota"]},
        {"question": SHORT, "image_id": "11", "answers": ["5", "6", "", ""]},
        {"question": SHORT, "image_id": "11"},
    ]
    data = [entry | {"question_id": 34602 + i, "set_name": "train"} for i, entry in enumerate(data)]
    source = write_json(root / "TextVQA_0.5.1_train.json", {"dataset_type": "train", "data": data})
    wanted = [_vqa(jpeg(1), "dakota"), _vqa(jpeg(2), "5")]
    return Example("textvqa", [source], [images], wanted, ["no answer"])


def textcaps(root: Path) -> Example:
    images = files(root / "images", {"054c.jpg": jpeg(1)})
    data = [
        {
            "image_id": "054c",
            "caption_id": 7 + i,
            "caption_str": text,
            "reference_strs": ["A sign.", "Stop."],
        }
        for i, text in enumerate(["A sign.", "Stop.", ""])
    ]
    source = write_json(root / "TextCaps_0.1_train.json", {"data": data})
    wanted = [caption(jpeg(1), "A sign."), caption(jpeg(1), "Stop.")]
    return Example("textcaps", [source], [images], wanted, ["no caption"])


def vizwiz(root: Path) -> Example:
    names = ["VizWiz_train_00000000.jpg", "VizWiz_train_00000001.jpg"]
    images = files(root / "images", {names[0]: jpeg(1), f"train/{names[1]}": jpeg(2)})

    def entry(name: str, answers: list[str]) -> dict[str, Any]:
        given = [{"answer": answer, "answer_confidence": "yes"} for answer in answers]
        return {"image": name, "question": SHORT, "answers": given, "answer_type": "other", "answerable": 1}

    data = [
        entry(names[0], ["basil", "basil leaves", "basil"]),
        entry(names[1], ["unanswerable", "x"]),
        {"image": names[0], "question": SHORT},
    ]
    wanted = [
        _vqa(jpeg(1), "basil", task="vizwiz"),
        _vqa(jpeg(2), "unanswerable", task="vizwiz"),
    ]
    return Example("vizwiz", [write_json(root / "train.json", data)], [images], wanted, ["no answer"])


def _aokvqa(root: Path) -> tuple[list[Path], Path]:
    images = files(root / "images", {"000000299207.jpg": jpeg(1)})
    entry = {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": SHORT,
        "choices": ["fork", "plate", "cup", "bowl"],
        "correct_choice_idx": 2,
        "direct_answers": ["mug", "cup", "cup"],
        "difficult_direct_answer": False,
        "rationales": ["It has a handle."],
    }
    hidden = {k: v for k, v in entry.items() if k not in ("correct_choice_idx", "direct_answers")}
    return [write_json(root / "aokvqa_v1p0_train.json", [entry, hidden])], images


def aokvqa(root: Path) -> Example:
    sources, images = _aokvqa(root)
    asked = f"{SHORT}\nA. fork\nB. plate\nC. cup\nD. bowl"
    return Example("aokvqa", sources, [images], [_vqa(jpeg(1), "C", asked, "choice")], ["no answer"])


def aokvqa_direct(root: Path) -> Example:
    sources, images = _aokvqa(root)
    return Example("aokvqa-direct", sources, [images], [_vqa(jpeg(1), "cup")], ["no answer"])


def gqa(root: Path) -> Example:
    images = files(root / "images", {"2405722.jpg": jpeg(1), "images/n161313.jpg": jpeg(2)})
    entry = {
        "question": SHORT,
        "answer": "cup",
        "fullAnswer": "It is a cup.",
        "isBalanced": True,
        "types": {},
    }
    data = {
        "07333408": entry | {"imageId": "2405722"},
        "07333409": entry | {"imageId": "n161313"},
        "07333410": {"imageId": "2405722", "question": SHORT},
    }
    wanted = [_vqa(jpeg(1), "cup"), _vqa(jpeg(2), "cup")]
    return Example("gqa", [write_json(root / "train.json", data)], [images], wanted, ["no answer"])


def ocrvqa(root: Path) -> Example:
    images = files(root / "images", {"1421.jpg": jpeg(1), "images/0001.gif": jpeg(2)})
    book = {
        "questions": ["Who wrote this?", "Is it new?"],
        "answers": ["A. Nobody", "No"],
        "title": "A book",
        "split": 1,
    }
    data = {
        "1421": book | {"imageURL": "http://a.b/I/51.jpg"},
        "0001": book | {"imageURL": "http://a.b/I/52.gif"},
        "0002": book | {"imageURL": "http://a.b/I/53.jpg", "split": 3},
        "0003": book | {"imageURL": "http://a.b/I/53.jpg", "questions": [], "answers": []},
    }
    turns = [*qa("<image>\nWho wrote this?", "A. Nobody"), *qa("Is it new?", "No")]
    wanted = [Wanted([jpeg(1)], turns, "vqa"), Wanted([jpeg(2)], turns, "vqa")]
    return Example("ocrvqa", [write_json(root / "dataset.json", data)], [images], wanted, ["no question"])


def stvqa(root: Path) -> Example:
    images = files(root / "images", {"coco-text/COCO_train2014_000000209838.jpg": jpeg(1)})
    entry = {
        "question": SHORT,
        "answers": ["cup", "mug", "mug"],
        "file_path": "coco-text/COCO_train2014_000000209838.jpg",
        "file_name": "COCO_train2014_000000209838.jpg",
        "dataset": "coco-text",
        "question_id": 1,
    }
    data = {"task_name": "train_task_3", "data": [entry, {k: v for k, v in entry.items() if k != "answers"}]}
    source = write_json(root / "train_task_3.json", data)
    return Example("stvqa", [source], [images], [_vqa(jpeg(1), "mug")], ["no answer"])


def docvqa(root: Path) -> Example:
    images = files(root / "images", {"documents/xnbl0037_1.png": jpeg(1), "xnbl0038_2.png": jpeg(2)})
    entry = {"questionId": 337, "question": SHORT, "docId": 279, "answers": ["1/8/93"], "data_split": "train"}
    data = [
        entry | {"image": "documents/xnbl0037_1.png"},
        entry | {"image": "documents/xnbl0038_2.png", "answers": ["two", "2", "2"]},
        {"questionId": 338, "question": SHORT, "image": "documents/xnbl0037_1.png"},
    ]
    source = write_json(root / "train_v1.0.json", {"dataset_name": "docvqa", "data": data})
    wanted = [_vqa(jpeg(1), "1/8/93"), _vqa(jpeg(2), "2")]
    return Example("docvqa", [source], [images], wanted, ["no answer"])


def scienceqa(root: Path) -> Example:
    images = files(root / "images", {"train/1/image.png": jpeg(1)})
    problem = {
        "question": "Which is a force?",
        "choices": ["push", "cup"],
        "answer": 0,
        "hint": "Look at <image> the picture.",
        "image": "image.png",
        "task": "closed choice",
        "lecture": "",
        "split": "train",
    }
    data = {
        "1": problem,
        "2": problem | {"image": None, "hint": "", "answer": 1},
        "3": problem | {"split": "test"},
    }
    asked = "Which is a force?\nContext: Look at  the picture.\nA. push\nB. cup"
    wanted = [
        _vqa(jpeg(1), "A", asked, "choice"),
        Wanted([], qa("Which is a force?\nA. push\nB. cup", "B"), "choice"),
    ]
    return Example("scienceqa", [write_json(root / "problems.json", data)], [images], wanted)
