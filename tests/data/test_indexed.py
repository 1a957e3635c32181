"""Reading a dataset back: as megatron-core does, and never silently wrong after damage."""

from __future__ import annotations

import io
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
from megamm.data.manifest import FILE_NAME, SIGNATURE, file_sha256, hash_of
from megamm.data.token_file import HEADER, TokenFile, token_dtype, write_index
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
    write_manifest(directory, manifest)


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any], signed: bool = True) -> None:
    manifest = json.loads((directory / FILE_NAME).read_text())
    edit(manifest)
    write_manifest(directory, manifest, signed)


def write_manifest(directory: Path, manifest: dict[str, Any], signed: bool = True) -> None:
    if signed:
        manifest.pop(SIGNATURE, None)
        manifest[SIGNATURE] = hash_of(manifest)
    (directory / FILE_NAME).write_text(json.dumps(manifest))


def test_megatron_core_reads_the_same(dataset_dir: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    ours, theirs = PreparedDataset(dataset_dir), IndexedDataset(str(dataset_dir / "tokens"))
    assert len(ours) == len(theirs)
    for row in range(len(ours)):
        assert np.array_equal(ours[row].tokens, theirs[row])
    assert theirs.document_indices.tolist() == list(range(len(ours) + 1))


@pytest.mark.parametrize("vocab_size, dtype", [(32001, "<u2"), (103170, "<i4")])
@pytest.mark.parametrize("block", [1, 2, 100])
def test_token_files_of_both_widths(
    tmp_path: Path, vocab_size: int, dtype: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert token_dtype(vocab_size) == np.dtype(dtype)
    rows = [np.arange(n, dtype=dtype) + vocab_size - 100 for n in (1, 7, 30)]
    (tmp_path / "t.bin").write_bytes(b"".join(row.tobytes() for row in rows))
    lengths = io.BytesIO(np.array([1, 7, 30], "<i4").tobytes())
    monkeypatch.setattr("megamm.data.token_file.BLOCK", block)
    with open(tmp_path / "t.idx", "wb") as file:
        write_index(file, lengths, 3, np.dtype(dtype))
    ours, theirs = TokenFile(tmp_path / "t.bin", tmp_path / "t.idx"), IndexedDataset(str(tmp_path / "t"))
    for i, row in enumerate(rows):
        assert np.array_equal(ours[i], row) and np.array_equal(theirs[i], row)
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


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


def change_index(directory: Path, change: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]) -> None:
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
        lambda lengths, offsets, bounds: offsets.__setitem__(3, offsets[3] + 1),
        lambda lengths, offsets, bounds: offsets.__setitem__(-1, 10**9),
    ],
)
def test_pointers_must_be_consistent(copy: Path, change: Callable[..., Any]) -> None:
    """Under correct hashes, with rows asked together or one by one."""
    good = PreparedDataset(copy)
    wanted = [good[row].tokens.tolist() for row in range(50)]
    change_index(copy, change)
    try:
        dataset = PreparedDataset(copy)
    except InputError:
        return
    for read in (dataset.sizes, dataset.starts):
        with pytest.raises(InputError, match=indexed.TOKEN_INDEX):
            read(np.arange(50))
    damaged = 0
    for row in range(50):
        try:
            assert dataset[row].tokens.tolist() == wanted[row]
        except InputError:
            damaged += 1
    assert 1 <= damaged <= 2


def test_rows_asked_together(dataset_dir: Path) -> None:
    dataset, rows = PreparedDataset(dataset_dir), np.array([7, 0, 49, 7])
    starts, ends = dataset.starts(rows)
    sizes, images = dataset.sizes(rows)
    for row, start, end, size, count in zip(rows, starts, ends, sizes, images, strict=True):
        sample = dataset[row]
        assert np.array_equal(dataset.tokens[start:end], sample.tokens)
        assert np.array_equal(dataset.learnt[start:end], sample.learnt)
        assert (size, count) == (len(sample.tokens), len(sample.images))
    for row in (-1, 50):
        with pytest.raises(IndexError):
            dataset[row]


def test_a_sample_that_moved_is_damaged(copy: Path) -> None:
    """Two samples of one length exchange everything, checksums included; only their rows tell."""
    dataset = PreparedDataset(copy)
    sizes, images = dataset.sizes(np.arange(50))
    one, two = next(
        (i, j)
        for i in range(50)
        for j in range(i)
        if (sizes[i], images[i]) == (sizes[j], 0) and images[j] == 0
        if dataset[i].tokens.tolist() != dataset[j].tokens.tolist()
    )
    for name, dtype, spans in (
        (indexed.TOKENS, dataset.tokens.dtype, dataset.starts(np.array([one, two]))),
        (indexed.LOSS_MASK, "u1", dataset.starts(np.array([one, two]))),
        (indexed.CHECKSUMS, "<u4", ([one, two], [one + 1, two + 1])),
    ):
        values = np.fromfile(copy / name, dtype)
        first, second = (slice(start, end) for start, end in zip(*spans, strict=True))
        values[first], values[second] = values[second].copy(), values[first].copy()
        values.tofile(copy / name)
    sign(copy)
    moved = PreparedDataset(copy)
    for row in (one, two):
        with pytest.raises(InputError, match=f"sample {row} is damaged"):
            moved[row]


def test_opening_costs_the_same_for_any_number(
    dataset_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of large files nothing is read but the header of the index."""
    copy = Path(shutil.copytree(dataset_dir, tmp_path / "copy"))
    monkeypatch.setattr(indexed, "HASH_LIMIT", 1000)
    hashed: list[Path] = []
    real = file_sha256

    def seen(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr("megamm.data.manifest.file_sha256", seen)
    PreparedDataset(copy)
    assert hashed and sum(path.stat().st_size for path in hashed) <= 1000
    PreparedDataset(copy).check()
    assert set(FILES) <= {path.name for path in hashed}


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(version=3),
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
        lambda m: m.update(containers=[["folder", "/nowhere/at/all", 0]]),
        lambda m: m.update(tokenizer_sha256=None),
        lambda m: m.update(vocab_size=10**6),
        lambda m: m.update(extra=1),
        lambda m: m.pop("template"),
    ],
)
def test_damaged_manifests(copy: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    whole = (copy / FILE_NAME).read_text()
    edit_manifest(copy, edit)
    with pytest.raises(InputError):
        PreparedDataset(copy)
    (copy / FILE_NAME).write_text(whole)
    edit_manifest(copy, edit, signed=False)
    with pytest.raises(InputError, match="manifest"):
        PreparedDataset(copy)


def test_images_in_containers_that_the_manifest_does_not_name(copy: Path) -> None:
    edit_manifest(copy, lambda m: m.update(containers=[]))
    with pytest.raises(InputError, match="sample 0 is damaged"):
        PreparedDataset(copy).read_image(0)


def test_a_manifest_is_signed(copy: Path) -> None:
    """A change that nothing else contradicts."""
    edit_manifest(copy, lambda m: m.update(template="plain"), signed=False)
    with pytest.raises(InputError, match="manifest is damaged"):
        PreparedDataset(copy)
    edit_manifest(copy, lambda m: None)
    assert PreparedDataset(copy).manifest.template == "plain"


def test_the_first_version_is_to_be_prepared_again(copy: Path) -> None:
    edit_manifest(copy, lambda m: (m.update(version=1), m.pop(SIGNATURE)), signed=False)
    with pytest.raises(InputError, match=r"another version of megamm; run `megamm prepare` again"):
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
