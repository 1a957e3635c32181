"""From every source format to a dataset, through the commands: prepared, checked, previewed, read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamm import cli
from megamm.config import ImageConfig
from megamm.data.formats import FORMATS
from megamm.data.image_header import open_image
from megamm.data.indexed import SKIPPED, PreparedDataset
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from tests.data.formats.example import Example, Wanted
from tests.data.formats.examples import EXAMPLES

MAX_PIXELS = ImageConfig().max_pixels


@pytest.fixture(scope="module")
def tokenizer_with_chunks(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """The tokenizer of these tests with the token that interleaved documents need."""
    out = tmp_path_factory.mktemp("tokenizers") / "chunks"
    extended = ["--from", str(tokenizer_dir / "tokenizer.model"), "--add-token", "<|endofchunk|>"]
    assert cli.main(["prepare", "tokenizer", *extended, "--out", str(out)]) == 0
    return out


def template_for(example: Example) -> str:
    if example.role != "document":
        return "vicuna"
    return "interleaved" if any(wanted.images for wanted in example.wanted) else "text"


def options(example: Example) -> list[str]:
    given = example.options
    names = FORMATS[example.format].uses
    return [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(given, name)))]


def usable(wanted: Wanted) -> bool:
    """Whether prepare can keep it: its images are pictures."""
    try:
        for data in wanted.images:
            open_image(data, MAX_PIXELS)
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", EXAMPLES)
def test_from_source_to_preview(
    name: str, tmp_path: Path, tokenizer_with_chunks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    example = EXAMPLES[name](source)
    command = ["prepare", *map(str, example.sources), "--format", example.format, "--out", str(out)]
    command += ["--tokenizer", str(tokenizer_with_chunks), "--template", template_for(example)]
    command += [*options(example), *(["--images", *map(str, example.images)] if example.images else [])]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert cli.main(["data", "check", str(out), "--workers", "0"]) == 0, capsys.readouterr().out
    assert cli.main(["data", "stats", str(out), "--json"]) == 0
    assert cli.main(["data", "preview", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()

    dataset = PreparedDataset(out)
    kept = [wanted for wanted in example.wanted if usable(wanted)]
    assert len(kept) == len(dataset) and kept
    skipped = [json.loads(line) for line in (out / SKIPPED).read_text().splitlines()]
    for reason in example.skipped:
        assert any(reason in line["reason"] for line in skipped)
    for row, wanted in enumerate(kept):
        sample = dataset[row]
        assert [dataset.read_image(image) for image in sample.images] == wanted.images
        text = decoded(dataset.tokenizer(), sample.tokens[sample.learnt != 0].tolist())
        for turn in learnt_turns(wanted.turns):
            assert squeezed(turn.text) in text
    assert page.count("<img") >= min(1, dataset.num_images)


def learnt_turns(turns: list[Turn]) -> list[Turn]:
    """What carries loss as a whole: answers, and documents without images."""
    return [
        turn
        for turn in turns
        if turn.role == "assistant" or (turn.role == "document" and IMAGE_TOKEN not in turn.text)
    ]


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return squeezed(tokenizer.decode(ids))


def squeezed(text: str) -> str:
    """Without white space, which templates strip around images and ends."""
    return "".join(text.split())
