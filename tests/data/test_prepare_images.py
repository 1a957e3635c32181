"""How `megamm prepare` finds and looks at images: places, alternative names, documents, checks, base64."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megamm.data.conversation import Conversation, ImageRef, Skipped, TarPlace
from megamm.data.formats import FORMATS, Chunk, Format
from megamm.data.image_header import ImageError
from megamm.data.image_store import index_tar
from megamm.data.indexed import SKIPPED, PreparedDataset
from megamm.data.prepare import prepare
from megamm.data.sample_checksum import at_row, at_rows
from megamm.data.templates import Turn
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from tests.data.helpers import conversations, encode, picture, prepared, write_images, write_tar


class Given(Format):
    """Entries that a test gives."""

    entries: Sequence[Conversation | Skipped] = ()
    tars: Sequence[Path] = ()

    def chunks(self, sources: Sequence[Path]) -> Iterator[Chunk]:
        yield Chunk(str(sources[0]), 0, None)

    def read(self, chunk: Chunk) -> Iterator[Conversation | Skipped]:
        yield from self.entries

    def image_tars(self, sources: Sequence[Path]) -> list[Path]:
        return list(self.tars)


class Documents:
    """Stands for the template of documents: the text as it is, all of it learnt."""

    name = "documents"

    def render(self, turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        ids = tokenizer.encode("".join(turn.text for turn in turns))
        return ids, [token != tokenizer.image_id for token in ids]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> type[Given]:
    monkeypatch.setitem(FORMATS, "given", Given)
    monkeypatch.setattr(Given, "entries", ())
    monkeypatch.setattr(Given, "tars", ())
    for module in ("prepare", "prepare_render"):
        monkeypatch.setattr(f"megamm.data.{module}.Template.by_name", lambda name: Documents())
    return Given


def caption(*images: ImageRef) -> Conversation:
    return Conversation("k", 0, list(images), [Turn("user", "<image>" * len(images)), Turn("assistant", "x")])


def run(root: Path, tokenizer: Path, images: list[Path], **options: Any) -> PreparedDataset:
    (root / "source").write_text("")
    report = prepare([root / "source"], "given", root / "out", tokenizer, images, "documents", 1, **options)
    return PreparedDataset(report.out)


def test_places_told_by_the_source(given: type[Given], tmp_path: Path, tokenizer_dir: Path) -> None:
    """Raw and base64 stretches of a tar among the sources, mixed with names in another."""
    names = write_images(tmp_path / "images", 3)
    data = [(tmp_path / "images" / name).read_bytes() for name in names]
    (tmp_path / "images" / "text").write_bytes(b'{"x": "' + base64.b64encode(data[1]) + b'"}')
    (tmp_path / "images" / "wrong").write_bytes(b"????" * 30)
    told = write_tar(tmp_path / "told.tar", tmp_path / "images")
    named = write_tar(tmp_path / "named.tar", tmp_path / "images")
    index = index_tar(told)
    start, length = index["text"][0] + 7, len(base64.b64encode(data[1]))
    given.tars = [told]
    given.entries = [
        caption(
            TarPlace(str(told), names[0], *index[names[0]]),
            TarPlace(str(told), "inside", start, length, "base64"),
            names[2],
        ),
        caption(TarPlace(str(told), "wrong", *index["wrong"], "base64")),
        caption(TarPlace(str(told), "behind", 10**9, 10)),
    ]
    for checks in ("full", "header", "none"):
        out = tmp_path / checks
        out.mkdir()
        dataset = run(out, tokenizer_dir, [named], image_checks=checks)
        sample = dataset[0]
        assert [dataset.read_image(image) for image in sample.images] == data
        kinds = [dataset.store.containers[dataset.location(i).container].kind for i in sample.images]
        assert kinds == ["tar", "base64", "tar"]
        if checks == "none":
            assert len(dataset) == 3  # not looked at
            for image, reason in ((3, "no base64"), (4, "behind the end")):
                with pytest.raises(ImageError, match=reason):
                    dataset.read_image(image)
        else:
            lines = [json.loads(line) for line in (dataset.directory / SKIPPED).read_text().splitlines()]
            assert [(line["image"], line["reason"]) for line in lines] == [
                ("wrong", "is no base64 text"),
                ("behind", "lies behind the end of its tar file"),
            ]


def test_the_first_of_alternative_names_counts(
    given: type[Given], tmp_path: Path, tokenizer_dir: Path
) -> None:
    names = write_images(tmp_path / "images", 2)
    given.entries = [
        caption(("none.jpg", names[1], names[0])),
        caption(("none.jpg", "../up.jpg")),
        Skipped("key", 7, "too short"),
    ]
    dataset = run(tmp_path, tokenizer_dir, [tmp_path / "images"])
    assert len(dataset) == 1 and dataset.location(0).name == names[1]
    lines = [json.loads(line) for line in (dataset.directory / SKIPPED).read_text().splitlines()]
    assert [(line["id"], line["entry"], line["image"]) for line in lines] == [
        ("k", 1, "none.jpg"),
        ("key", 8, None),
    ]
    assert lines[1]["reason"] == "too short"
    assert dataset.manifest.counts["skipped"] == 2


def test_documents_lose_only_the_images_that_are_bad(
    given: type[Given], tmp_path: Path, tokenizer_dir: Path, tokenizer: Tokenizer
) -> None:
    names = write_images(tmp_path / "images", 2)
    text = Turn("document", "a <image> b<image>c <image>d")
    given.entries = [
        Conversation("1", 0, [names[0], "none.jpg", names[1]], [text]),
        Conversation("2", 1, ["none", "none", "none"], [text]),
        Conversation("3", 2, [], [Turn("document", "only words")]),
    ]
    dataset = run(tmp_path, tokenizer_dir, [tmp_path / "images"])
    assert [tokenizer.decode(dataset[row].tokens, skip_special=False) for row in range(2)] == [
        "a <image> bc <image>d",
        "only words",
    ]
    assert [dataset.location(image).name for image in dataset[0].images] == names
    counts = dataset.manifest.counts
    assert (counts["samples"], counts["text_only_samples"]) == (2, 1)
    assert (counts["dropped_images"], counts["skipped"]) == (1, 1)


def test_every_image_has_a_placeholder(given: type[Given], tmp_path: Path, tokenizer_dir: Path) -> None:
    names = write_images(tmp_path / "images", 1)
    given.entries = [Conversation("k", 4, [names[0]], [Turn("user", "a"), Turn("assistant", "b")])]
    with pytest.raises(InputError, match=r"source: entry 5 \(id 'k'\): has other images than <image> place"):
        run(tmp_path, tokenizer_dir, [tmp_path / "images"])


def test_what_each_check_stores_and_notices(tmp_path: Path, tokenizer_dir: Path) -> None:
    """ "header" reads more only where the size does not stand at the beginning; "none" opens nothing."""
    folder = tmp_path / "images"
    names = write_images(folder, 4)
    (folder / names[0]).write_bytes(encode(picture(9, 50, 60), "JPEG", icc_profile=b"x" * 200_000))
    (folder / names[1]).write_bytes(b"<html>")
    entries = conversations(names, 12)
    sizes = {}
    for checks in ("full", "header", "none"):
        report = prepared(tmp_path, entries, tokenizer_dir, [folder], checks, image_checks=checks)
        dataset = PreparedDataset(report.out)
        assert dataset.manifest.image_checks == checks
        records = dataset._images
        sizes[checks] = list(zip(records["width"].tolist(), records["height"].tolist(), strict=True))
        assert (records["crc32"] != 0).all() == (checks == "full") and (
            checks == "full" or not records["crc32"].any()
        )
    assert sizes["full"] == sizes["header"] and sizes["full"][0] == (50, 60)
    assert set(sizes["none"]) == {(0, 0)} and len(sizes["none"]) > len(sizes["full"])
    path = folder / names[2]
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    for checks in ("full", "header"):
        dataset = PreparedDataset(tmp_path / checks)
        image = next(i for i in range(dataset.num_images) if dataset.location(i).name == names[2])
        if checks == "full":
            with pytest.raises(ImageError, match="has changed"):
                dataset.read_image(image)
        else:
            assert dataset.read_image(image) == data


def test_rows_beyond_32_bits_have_checksums() -> None:
    first = (1 << 32) - 2
    many = at_rows(np.full(4, 7, np.uint32), first)
    assert many.tolist() == [at_row(7, first + i) for i in range(4)]
    assert len(set(many.tolist())) == 4
