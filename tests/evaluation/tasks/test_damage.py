"""Wrong data: one sentence that names file, entry and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megamm.errors import InputError
from megamm.evaluation.tasks import TASKS, read_items
from tests.evaluation.tasks import layouts


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes the JSON of one file of a benchmark."""

    def apply(root: Path) -> None:
        (path,) = root.rglob(name)
        content = json.loads(path.read_text())
        change(content)
        layouts.put(path, content)

    return apply


def rewrite(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Puts something else in the place of the JSON of one file."""

    def apply(root: Path) -> None:
        (path,) = root.rglob(name)
        layouts.put(path, change(json.loads(path.read_text())))

    return apply


def edit_lines(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        (path,) = root.rglob(name)
        content = [json.loads(line) for line in path.read_text().splitlines()]
        change(content)
        layouts.put(path, layouts.lines(*content))

    return apply


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        (path,) = root.rglob(name)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return apply


def drop(name: str) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        for path in [*root.rglob(name)]:
            path.unlink()

    return apply


QUESTIONS, ANNOTATIONS = "v2_OpenEnded_*.json", "v2_mscoco_*.json"
CASES: list[tuple[str, Callable[[Path], None], str]] = [
    (
        "coco_caption",
        edit("captions*.json", lambda d: d["images"][1].pop("file_name")),
        'image 2: has no "file_name"',
    ),
    ("coco_caption", edit("captions*.json", lambda d: d["images"][1].update(id=42)), "'42' stands twice"),
    (
        "coco_caption",
        edit("captions*.json", lambda d: d["annotations"][0].update(caption=3.5)),
        '"caption" is 3.5',
    ),
    ("coco_caption", edit("captions*.json", lambda d: d.pop("images")), 'has no "images"'),
    ("coco_caption", drop("*.json"), "holds no dataset_coco.json nor captions_val2014.json"),
    (
        "flickr30k",
        edit("dataset*.json", lambda d: d["images"][1].update(sentences="x")),
        'image 2: "sentences" is',
    ),
    (
        "flickr30k",
        rewrite("dataset*.json", lambda d: {"images": d["images"][:1]}),
        'no images of the split "test"',
    ),
    ("nocaps", edit("nocaps*.json", lambda d: d["images"][0].update(domain=[])), '"domain" is'),
    ("vqav2", edit(QUESTIONS, lambda d: d["questions"][2].pop("question")), 'entry 3: has no "question"'),
    ("vqav2", edit(QUESTIONS, lambda d: d["questions"][0].update(image_id="a")), "\"image_id\" is 'a'"),
    ("vqav2", edit(QUESTIONS, lambda d: d["questions"].append(d["questions"][0])), "'1000' stands twice"),
    ("vqav2", edit(QUESTIONS, lambda d: d.update(questions=["x"])), "entry 1: is no JSON object"),
    ("vqav2", edit(ANNOTATIONS, lambda d: d["annotations"][0].update(answers=[])), '"answers" is \\[\\]'),
    ("vqav2", edit(ANNOTATIONS, lambda d: d["annotations"][0].update(answers=[3])), '"answers" is \\[3\\]'),
    (
        "vqav2",
        edit(
            ANNOTATIONS,
            lambda d: [a.update(question_id=a["question_id"] + 50) for a in d["annotations"]] and None,
        ),
        "has annotations for none of the questions in",
    ),
    ("okvqa", replace("OpenEnded*.json", '"questions"', '"Questions"'), 'has no "questions"'),
    (
        "textvqa",
        edit("TextVQA_0*.json", lambda d: d["data"][0].update(question="")),
        'entry 1: "question" is',
    ),
    (
        "textvqa",
        edit("TextVQA_R*.json", lambda d: d["data"][1].pop("ocr_tokens")),
        'entry 2: has no "ocr_tokens"',
    ),
    ("vizwiz", edit("val.json", lambda d: d[1].update(image=7)), 'entry 2: "image" is 7'),
    ("vizwiz", edit("val.json", lambda d: d[1].update(image=d[0]["image"])), "stands twice"),
    ("vizwiz", rewrite("val.json", lambda d: []), "holds no questions"),
    ("vizwiz", replace("val.json", "[", "[[[,"), "line 1, column 4"),
    (
        "gqa",
        edit("testdev*.json", lambda d: d["201640614"].pop("imageId")),
        "'201640614'.* has no \"imageId\"",
    ),
    ("gqa", edit("testdev*.json", lambda d: d["201640614"].update(types=4)), '"types": is no JSON object'),
    (
        "pope",
        edit_lines("*random.json", lambda d: d[1].update(label="maybe")),
        "line 2: \"label\" is 'maybe'",
    ),
    ("pope", edit_lines("*random.json", lambda d: d[1].update(question_id=1)), "'random/1' stands twice"),
    ("pope", drop("*adversarial.json"), "holds no .*pope_adversarial"),
    ("mme", replace("10002.txt", "\tNo", "\tPerhaps"), r"10002\.txt: line 2: the answer is 'Perhaps'"),
    ("mme", replace("0020.txt", "\tYes", " Yes"), r"0020\.txt: line 1: has not 2 columns"),
    ("mme", drop("10002.txt"), "artwork: holds no .txt"),
    ("mmbench", replace("*.tsv", "index", "number"), "has no column 'index'"),
    ("mmbench", replace("*.tsv", "1000007", "seven"), "line 3: index is 'seven'"),
    (
        "mmbench",
        replace("*.tsv", "\tB\tidentity", "\tC\tidentity"),
        "row 1: the answer is 'C'; it must be one of A, B",
    ),
    ("mmbench", replace("*.tsv", "\twords\t9\t", "\twords\t8\t"), "row 4: its image is that of index '8'"),
    ("mmbench", replace("*.tsv", "/9j/", "/9j!"), "line 2: its image is no base64"),
    ("scienceqa_img", edit("problems.json", lambda d: d["3"].update(answer=2)), "number of one of 2 choices"),
    ("scienceqa_img", edit("pid_splits.json", lambda d: d.pop("test")), 'has no split "test"'),
    (
        "scienceqa_img",
        edit("problems.json", lambda d: [p.update(image=None) for p in d.values()]),
        "no question with a picture",
    ),
]


@pytest.mark.parametrize(
    ("task", "damage", "message"), CASES, ids=[f"{c[0]}-{n}" for n, c in enumerate(CASES)]
)
def test_sentence(task: str, damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    root = layouts.FOLDERS[task](tmp_path)
    damage(root)
    with pytest.raises(InputError, match=message) as caught:
        read_items(TASKS[task], [root], None, None)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


MMMU: list[tuple[dict[str, Any], str]] = [
    ({"options": "['a'"}, '"options" is'),
    ({"options": 7}, '"options" is 7'),
    ({"answer": "C"}, "the letter of one of 2 options"),
    ({"image_1": 5}, r"\(image_1\): is no picture"),
    ({"image_1": {"bytes": "%%%"}}, r"\(image_1\): is no base64"),
    ({"id": None}, '"id" is None'),
]


@pytest.mark.parametrize(("change", "message"), MMMU)
def test_damaged_mmmu(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = layouts.mmmu_lines(tmp_path)
    edit_lines("mmmu.jsonl", lambda rows: rows[0].update(change))(root)
    with pytest.raises(InputError, match=f"line 1.*{message}"):
        read_items(TASKS["mmmu"], [root], None, None)


def test_damaged_parquet(tmp_path: Path) -> None:
    root = layouts.mmmu_parquet(tmp_path)
    (path,) = root.glob("Math/*.parquet")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"Math.*: cannot be read as parquet"):
        read_items(TASKS["mmmu"], [root], None, None)


@pytest.mark.parametrize("task", TASKS)
def test_nothing_there(task: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder; .*--data"):
        read_items(TASKS[task], [tmp_path / "none"], None, None)
    with pytest.raises(InputError, match=r"holds no|holds none"):
        read_items(TASKS[task], [tmp_path], None, None)


def test_folders_that_hold_several_candidates(tmp_path: Path) -> None:
    root = layouts.gqa(tmp_path)
    layouts.gqa(root / "again")
    (root / "again" / "questions1.2" / "testdev_balanced_questions.json").rename(root / "again" / "x.json")
    (root / "again" / "x.json").rename(root / "images" / "testdev_balanced_questions.json")
    with pytest.raises(InputError, match=r"holds images/testdev.*, questions1\.2/testdev.*; give the one"):
        read_items(TASKS["gqa"], [root], None, None)


def test_annotations_alone(tmp_path: Path) -> None:
    root = layouts.vqa(tmp_path)
    (path,) = root.glob(ANNOTATIONS)
    with pytest.raises(InputError, match="holds annotations alone"):
        read_items(TASKS["vqav2"], [path], None, None)
    other = layouts.put(tmp_path / "x.json", {"images": []})
    with pytest.raises(InputError, match='neither "questions" nor "annotations"'):
        read_items(TASKS["vqav2"], [other], None, None)


def test_wrong_folder_of_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; .*--images"):
        read_items(TASKS["gqa"], [layouts.gqa(tmp_path)], tmp_path / "none", None)
