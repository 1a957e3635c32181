"""Random damage to every file of a dataset: the same data or a typed error, nothing else."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamm.data import image_places, indexed
from megamm.data.image_header import ImageError
from megamm.data.image_store import ImageStore, Location, describe, index_tar, safe_name
from megamm.data.indexed import PreparedDataset
from megamm.data.manifest import FILE_NAME
from megamm.errors import InputError
from tests.data.helpers import conversations, prepared, write_images, write_tar

ALWAYS = 500
MANY = pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


def mutated(whole: bytes, draw: random.Random) -> bytes | None:
    """`whole` with one piece of damage; None: the file is deleted."""
    size = len(whole)
    first, second = sorted(draw.randrange(size + 1) for _ in range(2)) if size else (0, 0)
    kind = draw.choice(
        ["bit", "byte", "cut", "zeros", "ones", "swap", "append", "repeat", "number", "delete"]
    )
    data = bytearray(whole)
    if kind in ("bit", "byte") and size:
        place = draw.randrange(size)
        data[place] = data[place] ^ 1 << draw.randrange(8) if kind == "bit" else draw.randrange(256)
    elif kind == "cut":
        del data[first:]
    elif kind in ("zeros", "ones"):
        data[first:second] = bytes([255 * (kind == "ones")]) * (second - first)
    elif kind == "swap":
        length = draw.choice([1, 4, 8, 40, 512])
        one, two = data[first : first + length], data[second : second + length]
        if len(one) == len(two):
            data[first : first + length], data[second : second + length] = two, one
    elif kind == "append":
        data += bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 8, 40, 512])))
    elif kind == "repeat":
        data[first:first] = data[first:second]
    elif kind == "number":  # a huge, negative or slightly other number where one may stand
        width = draw.choice([4, 8])
        place = draw.randrange(max(1, size - width))
        old = int.from_bytes(data[place : place + width], "little", signed=True)
        new = draw.choice([old + 1, old - 1, -1, -old, 1 << 31, 1 << 62, old << 8]) % (1 << 8 * width)
        data[place : place + width] = new.to_bytes(width, "little")
    return None if kind == "delete" else bytes(data)


def everything(directory: Path) -> Iterator[Any]:
    """What can be read of a dataset, piece by piece; a damaged piece is an error in its place."""
    dataset = PreparedDataset(directory)
    try:
        yield "length", len(dataset)
        for row in range(len(dataset)):
            try:
                sample = dataset[row]
                yield "sample", row, sample.tokens.tolist(), sample.learnt.tolist(), list(sample.images)
                for image in sample.images:
                    yield "image", image, dataset.location(image), dataset.read_image(image)
            except (InputError, ImageError):
                yield "damaged"
        for rows in ([row, (row + 5) % len(dataset)] for row in range(len(dataset))):  # as training reads
            try:
                found = dataset.samples(np.array(rows))
            except InputError:
                yield "damaged"
                continue
            tokens, learnt, starts, ends = found.stretches
            for number, row in enumerate(rows):
                place = slice(int(starts[number]), int(ends[number]))
                ids, mask = tokens[place].tolist(), learnt[place].tolist()
                yield "sample", row, ids, mask, list(found.images(number))
        for image in range(dataset.num_images):
            try:
                yield "image", image, dataset.location(image), dataset.read_image(image)
            except (InputError, ImageError):
                yield "damaged"
        try:
            dataset.sizes(np.arange(len(dataset)))
            yield "tokenizer", dataset.tokenizer().sha256
        except InputError:
            yield "damaged"
    finally:
        dataset.close()


@pytest.fixture(scope="module")
def whole_dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """12 samples with images from a tar."""
    root = tmp_path_factory.mktemp("damage")
    names = write_images(root / "images", 4)
    tar = write_tar(root / "a.tar", root / "images")
    return prepared(root, conversations([*names, "missing.png"], 15), tokenizer_dir, [tar]).out


@pytest.mark.parametrize("count", [ALWAYS, MANY])
def test_damaged_files_never_give_wrong_data(
    count: int, whole_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other time without the hashes of opening, as it is with files that are too large for them."""
    good = set(map(repr, everything(whole_dataset)))
    assert "'damaged'" not in good
    copy = Path(shutil.copytree(whole_dataset, tmp_path / "copy"))
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert len(files) == len(indexed.FILES) + 3
    draw, refused, damaged, unhurt = random.Random(count), 0, 0, 0
    for turn in range(count):
        path = draw.choice(files)
        whole = path.read_bytes()
        data = mutated(whole, draw)
        if data == whole:
            continue
        path.unlink() if data is None else path.write_bytes(data)
        monkeypatch.setattr(indexed, "HASH_LIMIT", 0 if turn % 2 else 1 << 26)
        try:
            found = {repr(piece) for piece in everything(copy)}
            assert found <= good | {repr("damaged")}, (path.name, turn)
            if turn % 2 == 0:
                assert path.name == FILE_NAME, "hashes find everything else"
            damaged, unhurt = damaged + (repr("damaged") in found), unhurt + (found == good)
        except InputError:
            refused += 1
        path.write_bytes(whole)
    assert refused > 0.6 * count and damaged > 0.02 * count and unhurt > 0


def allowed_places(data: bytes, found: dict[str, tuple[int, int]]) -> bool:
    return all(
        safe_name(name) == name and 0 <= offset <= offset + length <= len(data)
        for name, (offset, length) in found.items()
    )


@pytest.mark.parametrize("count", [ALWAYS, MANY])
def test_damaged_tars_are_a_typed_error_or_a_sound_index(count: int, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_images(folder, 3)
    (folder / ("long" * 40 + ".png")).write_bytes(b"x" * 700)
    (folder / "1.json").write_text(json.dumps({"url": "https://example.org/1.png"}))
    wholes = []
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format) as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, file.name)
        wholes.append((tmp_path / "a.tar").read_bytes())
    draw, path, refused = random.Random(count), tmp_path / "b.tar", 0
    for _ in range(count):
        data = mutated(draw.choice(wholes)[: draw.choice([3000, 1 << 30])], draw)
        if data is None:
            continue
        path.write_bytes(data)
        try:
            found = index_tar(path)
            assert allowed_places(data, found)
            rows = np.frombuffer(image_places.index_rows((0, str(path))), image_places.ROW)
            assert len(found) <= len(rows) <= len(found) + 1
            store_places(path, rows)
        except InputError:
            refused += 1
    assert count * 0.2 < refused < count * 0.95
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "b.tar", "images"]


def store_places(path: Path, rows: np.ndarray) -> None:
    """Every place that was indexed can be read, or is an ImageError."""
    store = ImageStore([describe(path)])
    for row in rows["place"]:
        data = store.read(Location(0, "x", int(row["offset"]), int(row["length"])))
        assert len(data) == row["length"]
    store.close()
