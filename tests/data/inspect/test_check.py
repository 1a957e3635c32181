"""Everything that was broken on purpose is found, once, and nothing else, by any number of workers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamm.data.assemble import Assembler
from megamm.data.indexed import LOSS_MASK, SKIPPED, PreparedDataset
from megamm.data.inspect import check as check_module
from megamm.data.inspect import check_images
from megamm.data.inspect import pool as pool_module
from megamm.data.inspect.check import CheckOptions, check
from megamm.data.inspect.findings import KINDS, PROBLEMS
from megamm.data.inspect.limits import Limits
from megamm.data.inspect.pool import Pool
from megamm.data.inspect.repeats import repeats, scratch
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError, RunError
from tests.data.documents import document as document_of
from tests.data.helpers import encode, picture, write_images, write_tar
from tests.data.inspect.damage import Planted, start_squares, write_dataset

ROOT = Path(__file__).parents[3]
LIMITS = Limits(tokens_per_image=8, sequence_length=60, max_images=3)
IMAGE = -1  # in ids below: the image token


def sample(number: int, text: int = 12, images: list[tuple[int, str]] | None = None, **other: Any) -> Planted:
    """Half question, half answer, unlike any other; its images stand first."""
    names = images or []
    half = [300 + number % 100, 200 + number // 100, *range(10, 10 + text // 2 - 2)]
    ids = [1, *[IMAGE] * len(names), *half, *half[::-1]]
    learnt = [0] * (len(ids) - len(half)) + [1] * len(half)
    return Planted(ids, learnt, names)._replace(**other)


def finish(samples: list[Planted], tokenizer: Tokenizer) -> list[Planted]:
    return [
        planted._replace(ids=[tokenizer.image_id if token == IMAGE else token for token in planted.ids])
        for planted in samples
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "pictures", 10)
    return tmp_path / "pictures"


@pytest.fixture
def damaged(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> tuple[Path, list[tuple[str, int | None]]]:
    """A dataset with everything wrong that can be, and the (kind, row) of all that is."""
    (folder / "cut.jpg").write_bytes(encode(picture(50, 200, 200), "JPEG")[:2500])
    (folder / "text.png").write_bytes(b"these are no pixels")
    (folder / "float.tiff").write_bytes(encode(picture(3).convert("F"), "TIFF"))
    tar = write_tar(tmp_path / "good.tar", folder)
    gone = shutil.copytree(folder, tmp_path / "gone")
    samples: list[Planted] = []
    planted: list[tuple[str, int | None]] = []

    def add(one: Planted, *kinds: str) -> int:
        samples.append(one)
        planted.extend((kind, len(samples) - 1) for kind in kinds)
        return len(samples) - 1

    for number in range(30):  # good ones, with the same ten images in a folder and in a tar
        container, name = number % 2, f"{number % 10}.{('jpg', 'png')[number % 2]}"
        bad = ["image"] * (number == 8)  # 8.jpg is going to be removed from the folder
        add(sample(number, images=[(container, name)] * (number % 3 > 0)), *bad)
    whole = sample(30)
    add(whole._replace(ids=[*whole.ids[:-1], tokenizer.vocab_size]), "vocabulary")
    add(whole._replace(ids=[whole.ids[0], 60000, *whole.ids[2:]]), "vocabulary")
    pair = sample(31, images=[(0, "0.jpg"), (0, "1.png")])
    add(pair._replace(images=pair.images[:1]), "placeholders")
    add(pair._replace(images=()), "placeholders")
    add(sample(32)._replace(images=[(0, "0.jpg")]), "placeholders")
    add(pair._replace(learnt=[0, 1, *pair.learnt[2:]]), "learnt_image")
    add(whole._replace(learnt=[0] * len(whole.ids)), "masked")
    add(whole._replace(learnt=[1] + [0] * (len(whole.ids) - 1)), "masked")
    add(Planted([1], [1]), "empty")
    add(samples[4], "duplicate")
    add(samples[4], "duplicate")
    add(samples[4]._replace(images=[(0, "6.jpg")]))  # the same text with another picture is another sample
    add(sample(33, text=80))  # text alone is cut, labels are left
    add(sample(34, text=200), "cut_masked")
    add(sample(35, images=[(0, "0.jpg")] * 4), "cut_images", "cut_masked")
    late = Planted([1, 20, 21, 22, IMAGE, *[40] * 46, IMAGE], [0, 1, 1, 1] + [0] * 48, pair.images)
    add(late, "cut_images")
    add(sample(36, images=[(0, "2.jpg"), (0, "cut.jpg")]), "image")
    add(sample(37, images=[(0, "cut.jpg")]))
    add(sample(38, images=[(0, "text.png")]), "image")
    add(sample(39, images=[(1, "float.tiff")]), "image")
    add(sample(40, images=[(1, "8.jpg")]))
    add(sample(41, images=[(0, "8.jpg")]))
    add(sample(42, images=[(0, "9.png")]), "image")  # is going to be changed
    add(sample(43, images=[(2, "3.png")]), "image")  # its folder is going to go
    directory = write_dataset(tmp_path / "out", finish(samples, tokenizer), [folder, tar, gone], tokenizer)
    (folder / "8.jpg").unlink()
    content = bytearray((folder / "9.png").read_bytes())
    content[50] ^= 1
    (folder / "9.png").write_bytes(content)
    shutil.rmtree(gone)
    with tar.open("ab") as file:
        file.write(b"\0" * 512)
    with (directory / SKIPPED).open("a") as skipped:
        skipped.write("{}\n")
    whole_tree = [("file", None), ("container", None), ("container", None)]
    return directory, whole_tree + planted


def listed(directory: Path, path: Path, **options: Any) -> list[dict[str, Any]]:
    """All findings, as they are written to a file; the report says the same."""
    report = check(directory, CheckOptions(listing=path, **options))
    findings = [json.loads(line) for line in path.read_text().splitlines()]
    assert report.counts == Counter(found["kind"] for found in findings)
    assert report.problems == sum(found["kind"] in PROBLEMS for found in findings)
    assert all(found["reason"] for found in findings)
    return findings


def places(findings: list[dict[str, Any]]) -> list[tuple[str, int | None]]:
    return sorted(((found["kind"], found.get("row")) for found in findings), key=str)


def test_all_that_is_planted_is_found_and_nothing_else(
    damaged: tuple[Path, list[tuple[str, int | None]]], tmp_path: Path
) -> None:
    directory, planted = damaged
    assert {kind for kind, _ in planted} == set(KINDS) - {"structure", "sample"}
    findings = listed(directory, tmp_path / "0.jsonl", limits=LIMITS, workers=0)
    assert places(findings) == sorted(planted, key=str)
    by_name = {found["name"]: found for found in findings if found["kind"] == "image"}
    assert by_name["cut.jpg"]["uses"] == 2 and by_name["8.jpg"]["uses"] == 3 and by_name["9.png"]["uses"] == 1
    assert "decoded" in by_name["cut.jpg"]["reason"] and "changed" in by_name["9.png"]["reason"]
    assert "missing" in by_name["8.jpg"]["reason"] and "missing" in by_name["3.png"]["reason"]
    assert "known format" in by_name["text.png"]["reason"]
    assert by_name["float.tiff"]["source"].endswith("good.tar")
    _, lost = [found for found in findings if found["kind"] == "cut_images"]
    assert lost["lost"] == 1 and lost["images"] == ["1.png"] and "58 of 66 positions" in lost["reason"]
    for workers in (1, 2):
        again = tmp_path / f"{workers}.jsonl"
        listed(directory, again, limits=LIMITS, workers=workers)
        assert again.read_bytes() == (tmp_path / "0.jsonl").read_bytes()


def test_what_is_not_asked_for_is_not_looked_at(
    damaged: tuple[Path, list[tuple[str, int | None]]], tmp_path: Path
) -> None:
    directory, planted = damaged
    without = [one for one in planted if not one[0].startswith("cut_")]
    findings = listed(directory, tmp_path / "header.jsonl", images="header", workers=0)
    header = [found["name"] for found in findings if found["kind"] == "image"]
    assert sorted(header) == ["3.png", "8.jpg", "9.png", "text.png"]
    findings = listed(directory, tmp_path / "none.jsonl", images="none", workers=0)
    assert places(findings) == sorted((one for one in without if one[0] != "image"), key=str)


def test_a_good_dataset_has_no_findings(dataset_dir: Path, image_folder: Path) -> None:
    report = check(dataset_dir, CheckOptions(limits=Limits(4, 200, 8), workers=0))
    assert (report.counts, report.samples, report.images) == ({}, 50, len(list(image_folder.iterdir())))
    assert report.cut == 0 and report.files >= 7
    assert report.lines(5)[0].endswith("files looked at") and ": no problems;" in report.lines(5)[0]


def test_unreadable_samples_stop_nothing(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = PreparedDataset.__getitem__

    def broken(self: PreparedDataset, row: int) -> Any:
        if row in (7, 20):
            raise [InputError("row 7: another checksum"), IndexError()][row == 20]
        return read(self, row)

    monkeypatch.setattr(PreparedDataset, "__getitem__", broken)
    report = check(dataset_dir, CheckOptions(workers=0))
    assert report.counts == {"sample": 2} and report.samples == 50 and report.images == 12
    assert [found["reason"] for found in report.examples["sample"]] == [
        "row 7: another checksum",
        "IndexError",
    ]


def test_a_dataset_that_cannot_be_opened_is_a_finding(dataset_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    (copy / LOSS_MASK).write_bytes((copy / LOSS_MASK).read_bytes()[:-1])
    report = check(copy, CheckOptions(workers=0))
    assert report.counts == {"file": 1, "structure": 1}
    (copy / LOSS_MASK).unlink()
    assert check(copy, CheckOptions(workers=0)).counts == {"file": 1, "structure": 1}
    with pytest.raises(InputError, match="no prepared dataset"):
        check(tmp_path, CheckOptions(workers=0))


def test_reports_name_few_and_count_all(damaged: tuple[Path, Any]) -> None:
    report = check(damaged[0], CheckOptions(limits=LIMITS, images="none", workers=0, examples=2))
    assert report.counts["placeholders"] == 3 and len(report.examples["placeholders"]) == 2
    text = "\n".join(report.lines(2))
    assert "placeholders: 3 samples" in text and "... and 1 more" in text
    assert "row 32: 2 placeholders for 1 images" in text


def test_limits_cut_as_training_does(tokenizer: Tokenizer) -> None:
    draw, image_id = np.random.default_rng(8), tokenizer.image_id
    for _ in range(300):
        limits = Limits(int(draw.integers(1, 9)), int(draw.integers(9, 40)), int(draw.integers(0, 4)))
        tokens = draw.choice([5, 6, 7, image_id], draw.integers(1, 40), p=[0.3, 0.3, 0.2, 0.2])
        learnt = ((draw.random(len(tokens)) < 0.2) & (tokens != image_id)).astype(np.uint8)
        assembler = Assembler(limits.tokens_per_image, image_id, 0)
        document = document_of(assembler, tokens, learnt, limits.sequence_length or 0, limits.max_images or 0)
        left = limits.cut(tokens, learnt, image_id)
        images = np.array([np.count_nonzero(tokens == image_id)])
        assert (left.positions, left.images) == (len(document.input_ids), document.num_images)
        assert (left.learnt, left.shorter) == (document.learnt, document.truncated)
        assert bool(limits.too_large(np.array([len(tokens)]), images)[0]) == document.truncated


def test_images_are_judged_as_by_the_recipe(dataset_dir: Path) -> None:
    limits = Limits(image_size=28)
    limits.image.max_pixels = 33 * 40
    report = check(dataset_dir, CheckOptions(limits=limits, images="header", workers=0))
    assert report.counts == {"image": 8}  # 30 + i pixels wide, 40 high
    assert "more than 1320" in report.examples["image"][0]["reason"]


@pytest.mark.parametrize("part", [3, 16, 1000])
def test_repeats_are_those_of_a_dictionary(part: int) -> None:
    keys = scratch(500, "<u8")
    keys[:] = np.random.default_rng(part).integers(0, 300, 500).astype(np.uint64) * np.uint64(2**55 + 7)
    first, uses = repeats(keys, part)
    seen: dict[int, int] = {}
    for place, key in enumerate(keys.tolist()):
        assert first[place] == seen.setdefault(key, place)
    count = Counter(keys.tolist())
    expected = [count[key] if seen[key] == place else 0 for place, key in enumerate(keys.tolist())]
    assert uses.tolist() == expected


def test_an_item_that_ends_its_process_costs_itself_alone() -> None:
    pool = Pool[int, list[int]](2, start_squares, (13,), lambda number: [-number])
    tasks = [list(range(start, start + 4)) for start in range(0, 24, 4)]
    results = [number for piece in pool.results(tasks) for number in piece]
    assert results == [-13 if number == 13 else number * number for number in range(24)]


def test_processes_end_with_their_parent() -> None:
    program = (
        "import os, signal; from megamm.data.inspect.pool import Pool;"
        "from tests.data.inspect.damage import start_squares;"
        "pool = Pool(2, start_squares, (13,), lambda number: []);"
        "results = pool.results([[n] for n in range(12)]); next(results);"
        "print(*pool._executor._processes, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, timeout=60)
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/exe").exists() for pid in left):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_machines_that_fail_do_not_blame_the_items(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no work below zero"):
        list(Pool[int, list[int]](1, start_squares, (-1,), lambda number: []).results([[1], [2]]))
    monkeypatch.setattr(pool_module, "MAX_CRASHES", 1)
    with pytest.raises(RunError, match="1 processes died; try fewer --workers"):
        list(Pool[int, list[int]](1, start_squares, (3,), lambda number: []).results([[3], [3]]))


def test_a_picture_that_ends_its_process_is_a_finding() -> None:
    assert check_images.crashed(4) == (1, [(4, check_images.CRASH)])
    scanned = check_module._crashed_sample(3)
    assert len(scanned.keys) == len(scanned.findings) == 1 and not scanned.images


def test_a_listing_that_cannot_be_written_is_one_sentence(dataset_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="choose another --list"):
        check(dataset_dir, CheckOptions(listing=tmp_path / "none" / "x.jsonl", workers=0))


def test_shapes_that_training_refuses_are_refused(dataset_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(image_size=28)
    limits.image.max_pixels = 2500
    looks = check_images.ImageCheck(PreparedDataset(dataset_dir), "header", limits)
    assert looks.look([0, 1]) == (2, [])
    monkeypatch.setattr(PreparedDataset, "read_image", lambda *_: encode(picture(1, 1, 80)))
    assert looks.look([0]) == (1, [(0, "is too long and thin (1 x 80 pixels)")])
    assert looks.look([0]) == (1, [(0, "is too long and thin (1 x 80 pixels)")])


@pytest.mark.parametrize(
    "name", ["tokens.bin", "loss_mask.bin", "images.bin", "image_names.bin", "checksums.bin"]
)
def test_a_flipped_bit_is_found_in_its_sample(dataset_dir: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    draw, whole = np.random.default_rng(len(name)), (copy / name).read_bytes()
    for _ in range(5):
        data = bytearray(whole)
        data[draw.integers(len(data) - 60)] ^= 1 << draw.integers(8)
        (copy / name).write_bytes(data)
        report = check(copy, CheckOptions(workers=0))
        assert report.counts["file"] == 1 and report.counts["sample"] in (1, 2)
        assert set(report.counts) == {"file", "sample"} and report.samples == 50
