"""Files that belong together: questions and annotations, images and captions."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats import make_format
from megamm.data.formats.lookup import lookup
from megamm.errors import InputError
from tests.data.formats.example import write_json


def read(format: str, *sources: Path) -> list[Conversation | Skipped]:
    reader = make_format(format)
    return [entry for chunk in reader.chunks(list(sources)) for entry in reader.read(chunk)]


def questions(path: Path, ids: list[Any]) -> Path:
    return write_json(
        path, {"questions": [{"question_id": i, "image_id": 1, "question": f"q{i}"} for i in ids]}
    )


def annotations(path: Path, ids: list[Any]) -> Path:
    return write_json(
        path, {"annotations": [{"question_id": i, "multiple_choice_answer": f"a{i}"} for i in ids]}
    )


def test_several_splits_in_any_order(tmp_path: Path) -> None:
    train = [questions(tmp_path / "tq", [1, 2, 700]), annotations(tmp_path / "ta", [700, 2, 1])]
    val = [questions(tmp_path / "vq", [3]), annotations(tmp_path / "va", [3, 4, 5])]
    for sources in ([*train, *val], [val[1], train[0], train[1], val[0]]):
        found = [entry for entry in read("vqav2", *sources) if isinstance(entry, Conversation)]
        assert [entry.key for entry in found] == ["1", "2", "700", "3"]
        assert [entry.turns[1].text for entry in found] == ["a1", "a2", "a700", "a3"]


def test_files_that_are_missing_or_others(tmp_path: Path) -> None:
    asked, told = questions(tmp_path / "q", [1]), annotations(tmp_path / "a", [1])
    other = write_json(tmp_path / "o", {"data": []})
    a_list = write_json(tmp_path / "l", [1])
    bare = write_json(tmp_path / "b", {"annotations": [{"question_id": 1}]})
    an_object = write_json(tmp_path / "j", {"annotations": {}})
    for sources, message in (
        ([asked], "questions alone; give the file with the annotations too"),
        ([told], "annotations alone; give the file with the questions too"),
        ([asked, told, other], 'o: has neither "questions"'),
        ([a_list], "l: has neither"),
        ([questions(tmp_path / "e", []), told], '"questions" are empty'),
        ([asked, bare], 'b: entry 1: has no "answers"'),
        ([asked, an_object], '"annotations" is no list'),
    ):
        with pytest.raises(InputError, match=message):
            read("vqav2", *sources)
    with pytest.raises(InputError, match='has no "images"'):
        read("coco", told)


def test_image_ids_are_those_of_their_file(tmp_path: Path) -> None:
    sources = [
        write_json(
            tmp_path / name,
            {
                "images": [{"id": 1, "file_name": name}],
                "annotations": [{"id": 7, "image_id": 1, "caption": name}],
            },
        )
        for name in ("a", "b")
    ]
    found = [entry for entry in read("coco", *sources) if isinstance(entry, Conversation)]
    assert [entry.images for entry in found] == [[("a",)], [("b",)]]


def test_a_lookup_keeps_the_first() -> None:
    with lookup() as texts:
        assert texts.put([("a", "1"), ("b\0", "2"), ("a", "3")]) == 2
        keys = ["a", "b\0", *(f"no {i}" for i in range(2000))]
        assert texts.get(keys) == {"a": "1", "b\0": "2"}


def test_memory_does_not_grow_with_the_entries(tmp_path: Path) -> None:
    count = 10_000
    sources = [questions(tmp_path / "q", list(range(count))), annotations(tmp_path / "a", list(range(count)))]
    reader = make_format("vqav2")
    tracemalloc.start()
    try:
        found = sum(1 for chunk in reader.chunks(sources) for _ in reader.read(chunk))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    positions = [entry.position for entry in read("vqav2", *sources)]
    assert positions == list(range(count))
    assert found == count and peak < 12_000_000
