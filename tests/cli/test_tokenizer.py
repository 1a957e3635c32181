"""megamm prepare tokenizer --from: added tokens in their order, and wrong use."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamm.cli import main
from megamm.data.tokenizer import Tokenizer
from tests.data import huggingface


@pytest.mark.parametrize("kind", ["model", "json"])
def test_tokens_are_added(kind: str, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    if kind == "json":
        base = huggingface.write("prepend", tmp_path / "hf")
        first = Tokenizer.load(base).num_pieces
    else:
        base = tokenizer_dir / "tokenizer.model"
        first = Tokenizer.load(base).num_pieces
    command = ["prepare", "tokenizer", "--from", str(base), "--out", str(tmp_path / "out")]
    assert main([*command, "--add-token", "<|endofchunk|>"]) == 0
    assert f"<|endofchunk|> is {first}, <image> is {first + 1}" in capsys.readouterr().out
    made = Tokenizer.load(tmp_path / "out")
    assert made.added_tokens == {"<|endofchunk|>": first, "<image>": first + 1}
    # more of them follow the ids that are there
    command = ["prepare", "tokenizer", "--from", str(tmp_path / "out"), "--out", str(tmp_path / "more")]
    assert main([*command, "--add-token", "<a>", "--add-token", "<b>"]) == 0
    more = Tokenizer.load(tmp_path / "more").added_tokens
    assert more == {**made.added_tokens, "<a>": first + 2, "<b>": first + 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add-token", "<a>"], "--add-token: needs a tokenizer to extend"),
        ([], "give sources, --format and --vocab-size"),
        (["--from", "T", "--vocab-size", "300"], "--from: a tokenizer is extended, not trained"),
        (["--from", "T", "--add-token", ""], "--add-token: is empty"),
        (["--from", "T", "--add-token", "</s>"], "--add-token: '</s>' is a token of"),
        (["--from", "T", "--add-token", "<a>", "--add-token", "<a>"], "--add-token: '<a>' is a token of"),
        (["--from", "nowhere"], "nowhere: cannot read the tokenizer"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, tokenizer_dir: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(tokenizer_dir) if text == "T" else text for text in arguments]
    assert main(["prepare", "tokenizer", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_kept(tokenizer_dir: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in tokenizer_dir.iterdir()}
    assert main(["prepare", "tokenizer", "--from", str(tokenizer_dir), "--out", str(tokenizer_dir)]) == 2
    assert "exists already; choose another --out" in capsys.readouterr().err
    train = ["source.json", "--format", "llava", "--vocab-size", "400"]
    for out in (tokenizer_dir, tokenizer_dir / "tokenizer.model"):
        assert main(["prepare", "tokenizer", *train, "--out", str(out)]) == 2
        assert "exists already; choose another --out" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in tokenizer_dir.iterdir()}
