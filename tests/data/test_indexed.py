"""Reading a dataset back: as megatron-core does, and never silently wrong after damage."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamm.data import indexed
from megamm.data.image_header import ImageError
from megamm.data.indexed import FILES, PreparedDataset
from megamm.data.manifest import FILE_NAME, file_sha256
from megamm.data.token_file import HEADER, TokenFile, index_bytes, token_dtype
from megamm.errors import InputError
from tests.data.helpers import conversations, prepared, write_images, write_tar


@pytest.fixture
def copy(dataset_dir: Path, tmp_path: Path) -> Path:
    """A dataset directory that a test may damage."""
    return Path(shutil.copytree(dataset_dir, tmp_path / "copy"))


def sign(directory: Path) -> None:
    """Write sizes and hashes of the files, as they are now, into the manifest: damage that hashes miss."""
    manifest = json.loads((directory / FILE_NAME).read_text())
    for name in manifest["files"]:
        path = directory / name
        manifest["files"][name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
    (directory / FILE_NAME).write_text(json.dumps(manifest))


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((directory / FILE_NAME).read_text())
    edit(manifest)
    (directory / FILE_NAME).write_text(json.dumps(manifest))


def test_megatron_core_reads_the_same(dataset_dir: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = PreparedDataset(dataset_dir), IndexedDataset(str(dataset_dir / "tokens"))
    assert len(ours) == len(theirs)
    for row in range(len(ours)):
        assert np.array_equal(ours[row].tokens, theirs[row])
    assert theirs.document_indices.tolist() == list(range(len(ours) + 1))


@pytest.mark.parametrize("vocab_size, dtype", [(32001, "<u2"), (103170, "<i4")])
def test_token_files_of_both_widths(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert token_dtype(vocab_size) == np.dtype(dtype)
    rows = [np.arange(n, dtype=dtype) + vocab_size - 100 for n in (1, 7, 30)]
    (tmp_path / "t.bin").write_bytes(b"".join(row.tobytes() for row in rows))
    (tmp_path / "t.idx").write_bytes(index_bytes(np.array([1, 7, 30]), np.dtype(dtype)))
    ours, theirs = TokenFile(tmp_path / "t.bin", tmp_path / "t.idx"), IndexedDataset(str(tmp_path / "t"))
    for i, row in enumerate(rows):
        assert np.array_equal(ours[i], row) and np.array_equal(theirs[i], row)


@pytest.mark.parametrize("name", [n for n in FILES if n != indexed.SKIPPED])
def test_every_flipped_bit_and_cut_is_found(copy: Path, name: str) -> None:
    draw, path = random.Random(name), copy / name
    whole = path.read_bytes()
    for _ in range(12):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"has changed.*megamm prepare"):
            PreparedDataset(copy)
    for damaged in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=name):
            PreparedDataset(copy)
    path.unlink()
    with pytest.raises(InputError, match=name):
        PreparedDataset(copy)


@pytest.mark.parametrize("name", [indexed.TOKEN_INDEX, indexed.IMAGE_STARTS, indexed.IMAGES])
def test_structure_is_checked_without_hashes(copy: Path, name: str) -> None:
    """Damage under a correct hash: opening fails, or everything that can be read is inside the files."""
    draw, path = random.Random(name), copy / name
    whole, refused = path.read_bytes(), 0
    for _ in range(150):
        data = bytearray(whole)
        data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        sign(copy)
        try:
            dataset = PreparedDataset(copy)
        except InputError:
            refused += 1
            continue
        for row in range(len(dataset)):
            sample = dataset[row]
            assert len(sample.tokens) == len(sample.learnt) > 0
        for image in range(dataset.num_images):
            with contextlib.suppress(ImageError):
                dataset.read_image(image)
    # Of an index every byte counts; an image record also holds sizes and checksums, met when it is read.
    assert refused >= (15 if name == indexed.IMAGES else 140)


def write_index(directory: Path, change: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]) -> None:
    path = directory / indexed.TOKEN_INDEX
    data = bytearray(path.read_bytes())
    count = HEADER.unpack_from(data)[3]
    lengths = np.frombuffer(data, "<i4", count, HEADER.size)
    offsets = np.frombuffer(data, "<i8", count, HEADER.size + 4 * count)
    bounds = np.frombuffer(data, "<i8", count + 1, HEADER.size + 12 * count)
    change(lengths, offsets, bounds)
    path.write_bytes(data)
    sign(directory)


@pytest.mark.parametrize(
    "change",
    [
        lambda lengths, offsets, bounds: lengths.__setitem__(3, -1),
        lambda lengths, offsets, bounds: lengths.__setitem__(3, 2**30),
        lambda lengths, offsets, bounds: lengths.__setitem__(slice(3, 5), lengths[3:5] + np.array([1, -1])),
        lambda lengths, offsets, bounds: offsets.__setitem__(3, offsets[4]),
        lambda lengths, offsets, bounds: offsets.__setitem__(-1, 10**9),
        lambda lengths, offsets, bounds: bounds.__setitem__(2, 9),
    ],
)
def test_pointers_must_be_consistent(copy: Path, change: Callable[..., Any]) -> None:
    write_index(copy, change)
    with pytest.raises(InputError, match=indexed.TOKEN_INDEX):
        PreparedDataset(copy)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(format="other"),
        lambda m: m.update(counts=[]),
        lambda m: m["counts"].update(samples=49),
        lambda m: m["counts"].update(samples="50"),
        lambda m: m["counts"].pop("images"),
        lambda m: m.update(files=None),
        lambda m: m["files"].pop("tokens.bin"),
        lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}}),
        lambda m: m["files"]["tokens.bin"].update(size=1),
        lambda m: m.update(containers=[["pipe", "/", 0]]),
        lambda m: m.update(containers=[]),
        lambda m: m.update(containers=[["folder", "/nowhere/at/all", 0]]),
        lambda m: m.update(tokenizer_sha256=None),
        lambda m: m.update(vocab_size=10**6),
        lambda m: m.update(extra=1),
        lambda m: m.pop("template"),
    ],
)
def test_damaged_manifests(copy: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    edit_manifest(copy, edit)
    with pytest.raises(InputError):
        PreparedDataset(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "megamm dataset"}'])
def test_manifests_that_are_none(copy: Path, text: str) -> None:
    (copy / FILE_NAME).write_text(text)
    with pytest.raises(InputError, match="manifest"):
        PreparedDataset(copy)


def test_no_dataset(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"is no prepared dataset; write one with `megamm prepare`"):
            PreparedDataset(path)


def test_changed_images_are_noticed(tmp_path: Path, tokenizer_dir: Path) -> None:
    names = write_images(tmp_path / "images", 3)
    tar = write_tar(tmp_path / "a.tar", tmp_path / "images")
    entries = conversations(names, 3)
    in_folder = PreparedDataset(prepared(tmp_path, entries, tokenizer_dir, [tmp_path / "images"], "x").out)
    in_tar = PreparedDataset(prepared(tmp_path, entries, tokenizer_dir, [tar], "y").out)
    for dataset, path, start in (
        (in_folder, tmp_path / "images" / names[0], 0),
        (in_tar, tar, in_tar.location(0).offset),
    ):
        assert dataset.read_image(0)
        data = bytearray(path.read_bytes())
        data[start + 20] ^= 1
        path.write_bytes(data)
        with pytest.raises(ImageError, match="has changed"):
            dataset.read_image(0)
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    with pytest.raises(InputError, match=r"a.tar: has changed since"):
        PreparedDataset(tmp_path / "y")
