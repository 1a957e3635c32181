"""Each benchmark, read from its layout: questions, pictures, references."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamm.evaluation.tasks import TASKS, read_items
from megamm.evaluation.tasks.item import Item
from tests.evaluation.tasks import layouts


def items(task: str, *data: Path, images: Path | None = None) -> list[Item]:
    return read_items(TASKS[task], data, images, None)


def shown(item: Item) -> list[int]:
    return [layouts.number_of(source.read()) for source in item.images]


@pytest.mark.parametrize("task", TASKS)
def test_every_folder_is_read(task: str, tmp_path: Path) -> None:
    found = items(task, layouts.FOLDERS[task](tmp_path))
    assert len(found) >= 2 and len({item.id for item in found}) == len(found)
    assert all(shown(item) and item.reference and item.answer for item in found)
    assert [item.id for item in read_items(TASKS[task], [tmp_path], None, 1)] == [found[0].id]


def test_coco_captions_are_joined_by_image(tmp_path: Path) -> None:
    first, second = items("coco_caption", layouts.coco_caption(tmp_path))
    assert first.id == "42" and shown(first) == [1] and shown(second) == [2]
    assert first.reference == {"references": ["A dog on a rug .", "A small dog lies next to shoes"]}
    assert second.submission == {"image_id": 73} and second.kind == "caption"


def test_captions_of_a_test_split_are_unknown(tmp_path: Path) -> None:
    path = layouts.put(tmp_path / "image_info_test2014.json", {"images": [{"id": 1, "file_name": "a.jpg"}]})
    (item,) = items("coco_caption", path)
    assert item.reference is None and item.answer == ""


@pytest.mark.parametrize("coco", [True, False])
def test_karpathy_splits(coco: bool, tmp_path: Path) -> None:
    task = "coco_caption" if coco else "flickr30k"
    path = layouts.karpathy(tmp_path, coco)
    found = items(task, path)
    assert [item.id for item in found] == (["501", "504"] if coco else ["1001", "1004"])
    assert [item.submission["image_id"] for item in found] == ([501, 504] if coco else [1001, 1004])
    assert [shown(item) for item in found] == [[1], [4]]
    assert found[0].reference == {"references": ["caption 1 of one.", "caption 1 of two."]}
    training = list(TASKS[task].read([path], None, "train"))
    assert [item.answer for item in training] == [f"caption {n} of one." for n in (0, 2, 5)]


def test_nocaps_has_domains_and_names_of_open_images(tmp_path: Path) -> None:
    first, second = items("nocaps", layouts.nocaps(tmp_path))
    assert first.id == "0" and first.submission == {"image_id": 0}
    assert first.reference is not None and first.reference["split"] == "in-domain"
    assert len(first.reference["references"]) == 2
    assert shown(first) == [1] and shown(second) == [2]


def test_vqa_joins_questions_and_annotations(tmp_path: Path) -> None:
    root = layouts.vqa(tmp_path)
    questions = root / "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations = root / "v2_mscoco_val2014_annotations.json"
    found = items("vqav2", annotations, questions)
    assert [item.id for item in found] == ["1000", "1001", "1002"]
    assert found[1].reference == {
        **{"answers": ["one", *["2"] * 9], "answer_type": "number", "question_type": "how many"}
    }
    assert found[1].answer == "one" and found[1].question == "How many of 1?" and shown(found[1]) == [1]
    assert found[1].submission == {"question_id": 1001}
    assert items("vqav2", questions)[0].reference is None


def test_vqa_pictures_of_the_test_split(tmp_path: Path) -> None:
    questions = {"questions": [{"question_id": 262144000, "image_id": 262144, "question": "Is it?"}]}
    layouts.put(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", questions)
    layouts.put(tmp_path / "test2015" / "COCO_test2015_000000262144.jpg", layouts.picture(5))
    (item,) = items("vqav2", tmp_path)
    assert shown(item) == [5] and item.reference is None


def test_textvqa_with_and_without_words_in_the_picture(tmp_path: Path) -> None:
    root = layouts.textvqa(tmp_path)
    first, second = items("textvqa", root)
    assert first.ocr == ("nous", "les", "gosses") and second.ocr == ()
    assert first.reference == {"answers": ["nous"] * 10} and first.submission == {"question_id": 34602}
    assert items("textvqa", root / "TextVQA_0.5.1_val.json")[0].ocr is None
    files = [root / "TextVQA_Rosetta_OCR_v0.2_val.json", root / "TextVQA_0.5.1_val.json"]
    assert items("textvqa", *files)[0].ocr == first.ocr


def test_vizwiz_with_and_without_answers(tmp_path: Path) -> None:
    found = items("vizwiz", layouts.vizwiz(tmp_path))
    assert found[1].id == "VizWiz_val_00000001.jpg" and shown(found[1]) == [1]
    assert found[1].reference == {"answers": ["unanswerable", *["basil"] * 9], "answer_type": "other"}
    assert found[1].submission == {"image": "VizWiz_val_00000001.jpg"}
    test = layouts.put(tmp_path / "test.json", [{"image": "VizWiz_test_00000000.jpg", "question": "What?"}])
    assert items("vizwiz", test)[0].reference is None


def test_gqa_keeps_the_types_of_questions(tmp_path: Path) -> None:
    first, second = items("gqa", layouts.gqa(tmp_path))
    types = {"detailed": "existAttrTrue", "semantic": "attr", "structural": "verify"}
    assert first.reference == {"label": "no", "types": types} and shown(first) == [1]
    assert second.submission == {"questionId": "201640614"} and second.answer == "fence"


def test_pope_numbers_its_questions_in_each_split(tmp_path: Path) -> None:
    found = items("pope", layouts.pope(tmp_path))
    assert [item.id for item in found[:3]] == ["random/1", "random/2", "popular/1"]
    assert found[-1].reference == {"label": "no", "split": "adversarial"} and shown(found[-1]) == [1]
    assert len(items("pope", tmp_path / "coco_pope_popular.json")) == 2


def test_mme_in_both_layouts_of_the_release(tmp_path: Path) -> None:
    found = items("mme", layouts.mme(tmp_path))
    assert [item.id for item in found] == [
        *("artwork/10002/1", "artwork/10002/2", "code_reasoning/0020/1", "code_reasoning/0020/2")
    ]
    assert [shown(item) for item in found] == [[1], [1], [2], [2]]
    assert found[1].reference == {"label": "no", "task": "artwork", "image": "10002"}
    assert found[1].question == "Is this a photo? Please answer yes or no."


def test_mme_as_the_evaluation_tool_lists_it(tmp_path: Path) -> None:
    text = "0001.png\tIs it code?\tYes\tyes\n0001.png\tIs it C?\tNo\n"
    layouts.put(tmp_path / "code_reasoning.txt", text)
    layouts.put(tmp_path / "code_reasoning" / "0001.png", layouts.picture(3, "PNG"))
    found = items("mme", tmp_path)
    assert [item.id for item in found] == ["code_reasoning/0001.png/1", "code_reasoning/0001.png/2"]
    assert [item.answer for item in found] == ["Yes", "No"] and shown(found[0]) == [3]


def test_mmbench_rows_rotations_and_shared_pictures(tmp_path: Path) -> None:
    found = items("mmbench", layouts.mmbench(tmp_path))
    assert [item.id for item in found] == ["7", "1000007", "9", "1000009"]
    assert [shown(item) for item in found] == [[1], [1], [2], [2]]
    assert found[0].choices == ("Ann", "Bob") and found[0].hint == "He sings." and found[2].hint == ""
    assert found[0].question == 'Who is "he"?' and found[2].question == "Which\nword?"
    assert found[0].reference == {
        **{"label": "B", "A": "Ann", "B": "Bob", "category": "identity"},
        **{"l2-category": "finegrained", "split": "dev"},
    }


def test_scienceqa_takes_questions_with_pictures_in_the_order_of_the_split(tmp_path: Path) -> None:
    root = layouts.scienceqa(tmp_path)
    found = items("scienceqa_img", root)
    assert [item.id for item in found] == ["5", "3"] and [shown(item) for item in found] == [[2], [1]]
    assert found[1].hint == "A pond." and found[1].choices == ("stone", "wood")
    assert found[1].reference == {"label": "B", "options": ["stone", "wood"], "has_image": True}
    (root / "pid_splits.json").unlink()
    assert [item.id for item in items("scienceqa_img", root)] == ["3", "5"]


@pytest.mark.parametrize("layout", [layouts.mmmu_parquet, layouts.mmmu_lines])
def test_mmmu_pictures_stand_where_they_are_named(layout: object, tmp_path: Path) -> None:
    first, second, third = items("mmmu", layout(tmp_path))  # type: ignore[operator]
    assert first.question == "Compare <image> with <image>." and first.choices == ("like <image>", "it's new")
    assert shown(first) == [2, 1, 1] and shown(second) == [3] and shown(third) == [4]
    assert second.question == "<image>\nWho painted it?"
    assert (first.kind, third.kind) == ("mmmu", "mmmu_open")
    assert first.reference == {
        **{"label": "B", "question_type": "multiple-choice", "options": ["like <image 1>", "it's new"]}
    }
    assert third.reference == {"label": ["12", "12.0"], "question_type": "open", "options": []}


def test_mmmu_test_split_has_no_answers(tmp_path: Path) -> None:
    rows = layouts.mmmu_rows()
    kept = [row | {"answer": "?", "image_1": "a.png", "image_2": "b.png"} for row in rows]
    path = layouts.put(tmp_path / "test.jsonl", layouts.lines(*kept))
    assert [item.reference for item in items("mmmu", path)] == [None, None, None]


def test_limit_and_folder_of_pictures(tmp_path: Path) -> None:
    root = layouts.vizwiz(tmp_path / "data")
    (root / "val").rename(tmp_path / "elsewhere")
    (item,) = read_items(TASKS["vizwiz"], [root], tmp_path / "elsewhere", 1)
    assert shown(item) == [0]
    assert not items("vizwiz", root)[0].images[0].is_there()
