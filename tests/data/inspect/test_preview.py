"""The preview page: sound HTML that shows each token once and runs nothing, whatever the dataset holds."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from megamm.data.indexed import PreparedDataset
from megamm.data.inspect.limits import Limits
from megamm.data.inspect.preview import write_preview
from megamm.data.inspect.token_text import TokenTexts
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError, RunError
from megamm.pages.text import visible
from tests.data.helpers import encode, entry, picture, prepared
from tests.data.inspect.damage import Planted, write_dataset
from tests.html_walk import Walk

EVIL_NAME = '"><script>alert(1)<&\u202e.png'
EVIL_TEXT = "<script>alert('x')</script>\n</span></div> &lt;b&gt; 中文 \u202e\x07 <b onclick=\"x\">\u2028 🐶"


def walk(path: Path) -> Walk:
    walked = Walk()
    walked.feed(path.read_text(encoding="utf-8"))
    walked.close()
    assert walked.open == []
    assert {tag for tag, _ in walked.elements}.isdisjoint({"script", "b", "iframe", "object", "link", "form"})
    for tag, attributes in walked.elements:
        assert not any(name.startswith("on") for name in attributes), attributes
        assert str(attributes.get("href", "#")).startswith("#")
        assert str(attributes.get("src", "data:image/jpeg;base64,")).startswith("data:image/jpeg;base64,")
        assert tag != "a" or attributes["href"]
    assert any("default-src 'none'" in str(attributes.get("content")) for _, attributes in walked.elements)
    return walked


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Names, texts and a directory that would like to run."""
    root = tmp_path_factory.mktemp("preview") / '<img src=x onerror="alert(1)">'
    folder = root / "<i>pictures"
    folder.mkdir(parents=True)
    (folder / EVIL_NAME).write_bytes(encode(picture(1, 900, 300)))
    (folder / "gone.png").write_bytes(encode(picture(2)))
    entries = [entry(0, [EVIL_NAME, "gone.png"], EVIL_TEXT, EVIL_TEXT), entry(1, None, "What?", "Nothing.")]
    out = prepared(root, entries, tokenizer_dir, [folder]).out
    (folder / "gone.png").unlink()
    return out


def preview(directory: Path, out: Path, limits: Limits | None = None, **options: object) -> int:
    chosen = {"rows": None, "sample": 20, "seed": 0} | options
    return write_preview(directory, out, limits or Limits(), **chosen)  # type: ignore[arg-type]


def test_hostile_datasets_stay_text(hostile: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    assert preview(hostile, tmp_path / "p.html") == 2
    page = walk(tmp_path / "p.html")
    assert f"1 · {visible(EVIL_NAME)}" in [text for _, text in page.texts]
    assert "the file is missing" in page.of_class("bad")
    text = "".join(page.of_class("t")).replace("·", "")  # which stands for further tokens of a character
    assert text.count(visible(EVIL_TEXT)) == 2 and visible(EVIL_TEXT).count("[U+") == 3
    (image,) = [attributes for tag, attributes in page.elements if tag == "img"]
    small = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).partition(",")[2])))
    assert small.format == "JPEG" and small.size == (400, 133)
    assert any(text.startswith("900 x 300 · ") for _, text in page.texts)


def test_every_token_is_shown_with_its_loss(dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    dataset, tokenizer = PreparedDataset(dataset_dir), Tokenizer.load(tokenizer_dir)
    preview(dataset_dir, tmp_path / "p.html", rows=[4])
    page = walk(tmp_path / "p.html")
    spans = [attributes for tag, attributes in page.elements if tag == "span" and "data-i" in attributes]
    sample = dataset[4]
    assert [int(str(span["data-i"]).split()[1]) for span in spans] == sample.tokens.tolist()
    assert ["l" in str(span["class"]).split() for span in spans] == (sample.learnt != 0).tolist()
    text = "".join(text for classes, text in page.texts if "text" in classes)
    expected = tokenizer.decode(sample.tokens.tolist(), skip_special=False)
    assert re.sub(r"(<image>)\d", r"\1", text).replace("⏎", "") == expected
    assert "cut" not in {name for classes, _ in page.texts for name in classes}


@pytest.mark.parametrize("length, images", [(120, 8), (2048, 1)])
def test_the_cut_stands_where_training_cuts(
    length: int, images: int, dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    limits, dataset = Limits(20, length, images), PreparedDataset(dataset_dir)
    preview(dataset_dir, tmp_path / "p.html", limits, rows=[1])  # two images
    page = walk(tmp_path / "p.html")
    sample = dataset[1]
    left = limits.cut(sample.tokens, sample.learnt, dataset.manifest.image_id)
    (mark,) = page.of_class("cut")
    assert f"{left.positions} of {len(sample.tokens) + 38} positions and {left.images} of 2 images" in mark
    gone = [text for classes, text in page.texts if "gone" in classes and "t" in classes[-1].split()]
    everything = [text for classes, text in page.texts if classes and "t" in classes[-1].split()]
    assert 0 < len(gone) == len(sample.tokens) - left.tokens
    assert everything[-len(gone) :] == gone
    assert sum("lost to truncation" in text for _, text in page.texts) == 2 - left.images


def test_damaged_samples_are_shown_as_such(
    image_folder: Path,
    tokenizer: Tokenizer,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = [Planted([1, 60000, 20, 30], [0, 1, 1, 1]), Planted([1, 20], [0, 1])]
    out = write_dataset(tmp_path / "out", samples, [image_folder], tokenizer)
    read = PreparedDataset.__getitem__

    def broken(self: PreparedDataset, row: int) -> object:
        if row == 1:
            raise InputError("<row 1> is damaged")
        return read(self, row)

    monkeypatch.setattr(PreparedDataset, "__getitem__", broken)
    preview(out, tmp_path / "p.html")
    page = walk(tmp_path / "p.html")
    assert page.of_class("x") == ["[60000]"]
    assert any("<row 1> is damaged" in text for text in page.of_class("bad"))


def test_characters_of_several_tokens_are_put_together(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 中 é🐶")
    pieces = TokenTexts(tokenizer).pieces(ids)
    assert len(pieces) == len(ids) > 9
    assert "".join(piece.text for piece in pieces) == " a 中 é🐶"
    assert [piece.text for piece in pieces if piece.kind == "part"] == [""] * (2 + 1 + 3)
    half = TokenTexts(tokenizer).pieces([ids[0], tokenizer.encode("中", prefix=False)[-1], tokenizer.eos_id])
    assert [piece.kind for piece in half] == ["plain", "plain", "special"] and "\ufffd" in half[1].text


def test_the_same_seed_shows_the_same_rows(dataset_dir: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    pages = []
    for number, seed in enumerate((3, 3, 4)):
        assert preview(dataset_dir, tmp_path / f"{number}.html", sample=5, seed=seed) == 5
        pages.append((tmp_path / f"{number}.html").read_text())
    assert pages[0] == pages[1] != pages[2]


def test_wrong_input_is_one_sentence(dataset_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row 50 in 50 samples"):
        preview(dataset_dir, tmp_path / "p.html", rows=[3, 50])
    with pytest.raises(RunError, match="choose another --out"):
        preview(dataset_dir, tmp_path / "none" / "p.html")
