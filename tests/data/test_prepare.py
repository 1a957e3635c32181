"""From conversation files to a dataset directory, and every input that may be wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megamm.cli import main
from megamm.data.formats import FormatOptions
from megamm.data.indexed import FILES, SKIPPED, PreparedDataset
from megamm.data.manifest import FILE_NAME
from megamm.data.prepare import prepare, train_tokenizer_from_sources
from megamm.data.tokenizer import CONFIG_FILE, MODEL_FILE, Tokenizer
from megamm.errors import InputError, RunError
from tests.data.helpers import (
    conversations,
    encode,
    entry,
    picture,
    prepared,
    use_chunks,
    write_images,
    write_source,
    write_tar,
)


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def pictures(dataset: PreparedDataset) -> list[bytes]:
    return [dataset.read_image(i) for i in range(dataset.num_images)]


@pytest.fixture
def names(image_folder: Path) -> list[str]:
    return sorted(path.name for path in image_folder.iterdir())


def test_what_is_written(dataset_dir: Path, tokenizer: Tokenizer, image_folder: Path) -> None:
    dataset = PreparedDataset(dataset_dir)
    assert len(dataset) == 50
    tokenizer_files = [f"tokenizer/{name}" for name in (MODEL_FILE, CONFIG_FILE)]
    assert sorted(contents(dataset_dir)) == sorted([*FILES, FILE_NAME, *tokenizer_files])
    assert dataset.tokenizer().sha256 == tokenizer.sha256 == dataset.manifest.tokenizer_sha256
    sample = dataset[1]
    text = tokenizer.decode(sample.tokens, skip_special=False)
    assert text.endswith("USER: <image>\n<image>\nWhat is it, number 1? ASSISTANT: It is thing 1.</s>")
    learnt = [int(t) for t, flag in zip(sample.tokens, sample.learnt, strict=True) if flag]
    assert tokenizer.decode(learnt, skip_special=False) == "It is thing 1.</s>"
    names = sorted(path.name for path in image_folder.iterdir())
    assert [dataset.location(i).name for i in sample.images] == [names[1], names[2]]
    assert dataset.read_image(sample.images[1]) == (image_folder / names[2]).read_bytes()
    counts = dataset.manifest.counts
    assert counts["images"] == dataset.num_images == 17 + 2 * 17
    assert counts["learnt_tokens"] == sum(int(dataset[i].learnt.sum()) for i in range(50))
    dataset.check()


def test_bytes_do_not_depend_on_the_workers(
    tmp_path: Path, tokenizer_dir: Path, image_folder: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_chunks(7, monkeypatch.setattr)
    entries = conversations([*names, "missing.jpg"], 60)
    one = prepared(tmp_path, entries, tokenizer_dir, [image_folder], "one", workers=1)
    two = prepared(tmp_path, entries, tokenizer_dir, [image_folder], "two", workers=2)
    assert one.counts["skipped"] > 0
    assert contents(one.out) == contents(two.out)


def test_a_folder_and_a_tar_give_the_same_dataset(
    tmp_path: Path, tokenizer_dir: Path, image_folder: Path, names: list[str]
) -> None:
    entries = conversations(names, 20)
    tar = write_tar(tmp_path / "pictures.tar", image_folder)
    folder = PreparedDataset(prepared(tmp_path, entries, tokenizer_dir, [image_folder], "folder").out)
    packed = PreparedDataset(prepared(tmp_path, entries, tokenizer_dir, [tar], "tar").out)
    assert len(folder) == len(packed) == 20
    for row in range(20):
        assert folder[row].tokens.tolist() == packed[row].tokens.tolist()
        assert folder[row].images == packed[row].images
    assert pictures(folder) == pictures(packed)


def test_images_lie_in_several_places(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Each name is taken from the first place that has it; without places, beside its source."""
    first, second = tmp_path / "first", tmp_path / "second"
    data = {}
    for folder, keys in ((first, "ab"), (second, "bc")):
        folder.mkdir()
        for key in keys:
            data[folder, key] = encode(picture(len(data)))
            (folder / f"{key}.png").write_bytes(data[folder, key])
    tar = write_tar(tmp_path / "second.tar", second)
    entries = [entry(0, ["a.png", "b.png", "c.png"], "Which?", "None.")]
    for number, (places, b) in enumerate(
        [([first, second], first), ([second, first], second), ([tar, first], second), ([first, tar], first)]
    ):
        report = prepared(tmp_path, entries, tokenizer_dir, places, f"out{number}")
        wanted = [data[first, "a"], data[b, "b"], data[second, "c"]]
        assert pictures(PreparedDataset(report.out)) == wanted
    beside = prepared(first, [entry(0, "a.png", "Which?", "This.")], tokenizer_dir, [])
    assert pictures(PreparedDataset(beside.out)) == [data[first, "a"]]


def test_bad_images_are_skipped_and_told(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "images"
    (folder / "dir.png").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(encode(picture(0)))
    good = encode(picture(1))
    files = {"good.png": good, "empty.png": b"", "page.jpg": b"<html>404</html>", "head.png": good[:20]}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    bad = {
        "missing.jpg": "missing",
        "empty.png": "empty",
        "page.jpg": "not an image",
        "head.png": "",
        "dir.png": "not a regular file",
        "../outside.png": "leaves the image folder",
        str(tmp_path / "outside.png"): "leaves the image folder",
    }
    entries = [entry(i, name, "What?", "It.") for i, name in enumerate(["good.png", *bad])]
    entries.append(entry(99, ["good.png", "missing.jpg"], "Both?", "No."))
    report = prepared(tmp_path, entries, tokenizer_dir, [folder])
    assert report.counts["samples"] == 1
    assert report.counts["skipped"] == len(bad) + 1
    assert f"{len(bad) + 1} entries skipped" in report.summary()
    lines = [json.loads(line) for line in (report.out / SKIPPED).read_text().splitlines()]
    assert [line["image"] for line in lines] == [*bad, "missing.jpg"]
    assert [line["id"] for line in lines] == [*(f"id{i + 1}" for i in range(len(bad))), "id99"]
    for line, reason in zip(lines, bad.values(), strict=False):
        assert reason in line["reason"]


def test_no_usable_entry_is_an_error(tmp_path: Path, tokenizer_dir: Path, image_folder: Path) -> None:
    """Nor is a dataset that has lost all its images, though entries without images are left."""
    lost = entry(0, "nowhere.png", "a", "b")
    for entries in ([lost], [entry(1, None, "a", "b"), entry(2, None, "a", ""), lost]):
        with pytest.raises(InputError, match=r"not one of the images.*nowhere.png.*check the folders"):
            prepared(tmp_path, entries, tokenizer_dir, [image_folder])
        assert not (tmp_path / "out").exists()


def test_options_that_make_no_difference(tmp_path: Path, tokenizer_dir: Path, capsys: Any) -> None:
    source = write_source(tmp_path / "a.json", [entry(1, None, "a", "b")])
    command = ["prepare", str(source), "--tokenizer", str(tokenizer_dir), "--out", str(tmp_path / "out")]
    for options, message in (
        (["--format", "llava", "--max-images", "3"], "--max-images: makes no difference to --format llava"),
        (["--format", "obelics", "--split", "val"], "--split: makes no difference to --format obelics"),
        (["--format", "llava", "--template", "plain", "--instructions", "llava"], "writes no questions"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_split_without_entries(tmp_path: Path, tokenizer_dir: Path) -> None:
    problem = {"split": "train", "question": "a", "choices": ["b"], "answer": 0}
    problems = tmp_path / "problems.json"
    problems.write_text(json.dumps({"1": problem}))
    options = FormatOptions(split="val")
    with pytest.raises(InputError, match="split 'val'; check --split"):
        prepare([problems], "scienceqa", tmp_path / "out", tokenizer_dir, [], "vicuna", 1, options=options)


def test_preparing_again(tmp_path: Path, tokenizer_dir: Path, image_folder: Path, names: list[str]) -> None:
    entries = conversations(names, 5)
    first = prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    before = contents(first.out)
    again = prepared(tmp_path, entries, tokenizer_dir, [image_folder], workers=2)
    assert again.up_to_date and not first.up_to_date
    assert "up to date" in again.summary()
    assert again.counts == first.counts and contents(first.out) == before
    for change in ({"template": "plain"}, {"entries": entries[:-1]}):
        with pytest.raises(InputError, match="exists and was prepared otherwise"):
            prepared(
                tmp_path,
                **{"entries": entries, "tokenizer": tokenizer_dir, "images": [image_folder]} | change,
            )
    assert contents(first.out) == before
    (first.out / SKIPPED).write_text("x")
    with pytest.raises(InputError, match="is damaged; remove it"):
        prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"other: exists and is no prepared dataset; choose another --out$"):
        prepared(tmp_path, entries, tokenizer_dir, [image_folder], "other")


def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, tokenizer_dir: Path, image_folder: Path, names: list[str]
) -> None:
    entries = [*conversations(names, 5), entry(6, "0.jpg", "<image>", "b")]
    with pytest.raises(InputError, match="placeholders"):
        prepared(tmp_path, entries, tokenizer_dir, [image_folder])
    assert [path.name for path in tmp_path.iterdir()] == ["source.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path, tokenizer_dir: Path, image_folder: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        prepared(tmp_path, [entry(0, None, "a", "b")], tokenizer_dir, [image_folder], "file/out")


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": role, "value": value} for role, value in pairs]


GOOD = turns(("human", "<image>\nWhat?"), ("gpt", "It."))
BAD_ENTRIES = [
    (
        {"id": "x", "image": "0.jpg", "conversations": turns(("human", "<image><image>"), ("gpt", "b"))},
        "has 2 <image>",
    ),
    (
        {"id": "x", "image": ["0.jpg", "1.png"], "conversations": GOOD},
        "has 1 <image> placeholders and 2 images",
    ),
    ({"id": "x", "image": "0.jpg", "conversations": turns(("human", "a"), ("gpt", "b"))}, "has 0 <image>"),
    ({"id": "x", "conversations": GOOD}, "has 1 <image> placeholders and 0 images"),
    (
        {"id": "x", "image": "0.jpg", "conversations": turns(("human", "a"), ("gpt", "<image>"))},
        "in an answer",
    ),
    ({"id": "x", "image": 7, "conversations": GOOD}, '"image" must be a path'),
    ({"id": "x", "image": ["0.jpg", None], "conversations": GOOD}, '"image" must be a path'),
    ({"id": "x", "image": "0.jpg"}, 'has no "conversations"'),
    ({"id": "x", "conversations": []}, 'has no "conversations"'),
    ({"id": "x", "conversations": ["a", "b"]}, "turn 1: must be an object"),
    ({"id": "x", "conversations": turns(("human", "a"), ("gpt", None))}, "turn 2: must be an object"),
    ({"id": "x", "conversations": turns(("human", "a"), ("bing", "b"))}, "\"from\" is 'bing'"),
    ({"id": "x", "conversations": turns(("human", "a"), ("human", "b"), ("gpt", "c"))}, "do not alternate"),
    ({"id": "x", "conversations": turns(("human", "a"))}, "no question with an answer"),
    ({"id": "x", "conversations": turns(("human", "\ud800"), ("gpt", "b"))}, "surrogate"),
    ("text", "is no JSON object"),
]


@pytest.mark.parametrize("bad, message", BAD_ENTRIES)
def test_bad_entries(bad: Any, message: str, tmp_path: Path, tokenizer_dir: Path, image_folder: Path) -> None:
    """The error names file, entry and remedy."""
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, [entry(0, None, "a", "b"), bad], tokenizer_dir, [image_folder])
    text = str(caught.value)
    assert message in text
    assert f"{tmp_path / 'source.json'}: entry 2" in text
    assert isinstance(bad, str) or "(id 'x')" in text
    assert ";" in text and not (tmp_path / "out").exists()


def test_unfinished_conversations_keep_what_teaches(
    tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    conversation = turns(("gpt", "Hello."), ("human", "Who?"), ("gpt", "Me."), ("human", "And?"))
    report = prepared(tmp_path, [{"conversations": conversation}], tokenizer_dir, [])
    sample = PreparedDataset(report.out)[0]
    assert tokenizer.decode(sample.tokens).endswith("USER: Who? ASSISTANT: Me.")


def test_template_that_does_not_fit(tmp_path: Path, tokenizer_dir: Path) -> None:
    conversation = turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    for workers in (1, 2):
        with pytest.raises(
            InputError, match=r"entry 1 \(id '0'\): template plain: .*use the template vicuna"
        ):
            prepared(
                tmp_path,
                [{"conversations": conversation}],
                tokenizer_dir,
                [],
                template="plain",
                workers=workers,
            )


def test_wrong_arguments(tmp_path: Path, tokenizer_dir: Path, image_folder: Path) -> None:
    source = write_source(tmp_path / "a.json", [entry(0, None, "a", "b")])
    good = {
        "sources": [source],
        "format": "llava",
        "out": tmp_path / "out",
        "tokenizer": tokenizer_dir,
        "images": [image_folder],
        "template": "vicuna",
        "workers": 1,
    }
    wrong = {
        "sources": [([], "none given"), ([tmp_path / "no.json"], "no.json: there is no such file")],
        "format": [("none", "choose one of llava")],
        "tokenizer": [(tmp_path / "no", "cannot read the tokenizer")],
        "images": [([tmp_path / "no"], "neither a folder nor"), ([source], "neither a folder nor")],
        "template": [("chatml", "choose one of .*vicuna.*plain")],
        "workers": [(0, "give 1 or more")],
        "instructions": [("all", "choose one of infimm, llava, none")],
        "image_checks": [("some", "choose one of full, header, none")],
    }
    for key, cases in wrong.items():
        for value, message in cases:
            with pytest.raises(InputError, match=message):
                prepare(**good | {key: value})
    assert prepare(**good).counts["samples"] == 1


def test_a_tokenizer_from_sources_knows_the_template(tmp_path: Path) -> None:
    entries = [entry(i, "x.jpg", f"Question {i}?", f"Answer {i}.") for i in range(30)]
    source = write_source(tmp_path / "a.json", entries)
    tokenizer = train_tokenizer_from_sources([source], "llava", tmp_path / "tok", 420, "vicuna")
    assert Tokenizer.load(tmp_path / "tok").sha256 == tokenizer.sha256
    assert tokenizer.vocab_size == 420
    for word in ("USER", "ASSISTANT", "assistant"):
        assert len(tokenizer.encode(word)) <= 2, word


def test_images_may_be_given_by_their_whole_path(tmp_path: Path, tokenizer_dir: Path) -> None:
    (name,) = write_images(tmp_path / "images", 1)
    outside = tmp_path / "outside.jpg"
    outside.write_bytes((tmp_path / "images" / name).read_bytes())
    entries = [
        entry(0, str(tmp_path / "images" / name), "a", "b"),
        entry(1, str(outside), "a", "b"),
        entry(2, f"{tmp_path}/images/../outside.jpg", "a", "b"),
    ]
    report = prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"])
    assert (report.counts["samples"], report.counts["skipped"]) == (1, 2)
    assert "2 entries skipped (2 the path leaves the image folder), see" in report.summary()
    assert PreparedDataset(report.out).location(0).name == name
