"""Encoding, decoding, added tokens, training and bad files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data.tokenizer import CONFIG_FILE, MODEL_FILE, Tokenizer, train_tokenizer
from megamm.errors import InputError
from tests.data.helpers import VOCAB_SIZE


def test_ids_of_a_trained_tokenizer(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.pad_id == tokenizer.unk_id
    assert tokenizer.image_id == VOCAB_SIZE - 1
    assert tokenizer.added_tokens == {"<image>": VOCAB_SIZE - 1}


def test_special_tokens_split_the_text(tokenizer: Tokenizer) -> None:
    image, eos = tokenizer.image_id, tokenizer.eos_id
    house, plain = tokenizer.encode("house"), tokenizer.encode("house", prefix=False)
    assert house != plain
    assert tokenizer.encode("house<image>house</s>house") == [*house, image, *plain, eos, *plain]
    assert tokenizer.encode("<image>house") == [image, *plain]
    assert tokenizer.encode("<image> house", bos=True) == [tokenizer.bos_id, image, *house]
    assert tokenizer.encode("") == []


def test_a_leading_space_takes_the_place_of_the_prefix(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" the dog") == tokenizer.encode("the dog")
    assert tokenizer.encode("  the dog") != tokenizer.encode("the dog")


def test_stretches_equal_sentencepiece(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    """Where SentencePiece's own prefix rule and ours coincide, so do the ids."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / MODEL_FILE))
    for text in ("the dog runs", "A  B\n\n C\t", "17 windows", "日本 ☂", "USER: what? ASSISTANT: it"):
        assert tokenizer.encode(text) == reference.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
    plain = text.replace("\u2581", " ")  # SentencePiece's mark of a space is a space
    assert back == plain.removeprefix(" ")


def test_decode_skips_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a <image> b</s>", bos=True)
    assert tokenizer.decode(ids) == "a  b"
    assert tokenizer.decode(ids, skip_special=False) == "<s> a <image> b</s>"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([VOCAB_SIZE])


def test_saved_and_bare_model_are_the_same_tokenizer(tokenizer_dir: Path, tmp_path: Path) -> None:
    loaded = Tokenizer.load(tokenizer_dir)
    bare = Tokenizer.load(tokenizer_dir / MODEL_FILE)
    bare.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    sent = pickle.loads(pickle.dumps(loaded))
    assert loaded.sha256 == bare.sha256 == copy.sha256 == sent.sha256
    assert sent.files() == loaded.files() == copy.files()
    assert copy.encode("the <image> dog") == loaded.encode("the <image> dog")


def test_added_tokens_are_part_of_the_identity(tokenizer_dir: Path, tmp_path: Path) -> None:
    original = Tokenizer.load(tokenizer_dir)
    original.save(tmp_path)
    added = {"<image>": VOCAB_SIZE - 1, "<extra>": VOCAB_SIZE}
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"format": 1, "added_tokens": added}))
    changed = Tokenizer.load(tmp_path)
    assert changed.vocab_size == VOCAB_SIZE + 1
    assert changed.encode("<extra>") == [VOCAB_SIZE]
    assert changed.sha256 != original.sha256


def test_training_is_deterministic(tmp_path: Path) -> None:
    texts = [f"The quick brown fox number {i} jumps.\nAgain </s>" for i in range(50)]
    first = train_tokenizer(texts, tmp_path / "a", 320)
    second = train_tokenizer(texts, tmp_path / "b", 320)
    assert first.sha256 == second.sha256
    assert first.vocab_size == 320
    newline = first.encode("\n", prefix=False)
    assert len(newline) == 1 and first.decode(newline) == "\n"


@pytest.mark.parametrize("vocab_size", [10, 270, 100_000])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(InputError, match=r"vocab_size: .*choose another"):
        train_tokenizer(["some abcdefghijklmnopqrstuvwxyz text"] * 5, tmp_path, vocab_size)


def test_training_needs_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give more text"):
        train_tokenizer([], tmp_path, 300)


def test_bad_files(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = (tokenizer_dir / MODEL_FILE).read_bytes()
    with pytest.raises(InputError, match=r"nowhere.*cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "nowhere")
    for number, data in enumerate((b"", b"no model", model[: len(model) // 2], bytes(1000))):
        path = tmp_path / f"{number}.model"
        path.write_bytes(data)
        with pytest.raises(InputError, match="is not a SentencePiece model"):
            Tokenizer.load(path)


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        '{"format": 2, "added_tokens": {}}',
        '{"format": 1, "added_tokens": [1]}',
        '{"format": 1, "added_tokens": {"<image>": "x"}}',
        '{"format": 1, "added_tokens": {"<image>": 7}}',
        '{"format": 1, "added_tokens": {"<other>": 419}}',
        '{"format": 1, "added_tokens": {}}',
    ],
)
def test_bad_descriptions(tokenizer_dir: Path, tmp_path: Path, config: str) -> None:
    (tmp_path / MODEL_FILE).write_bytes((tokenizer_dir / MODEL_FILE).read_bytes())
    (tmp_path / CONFIG_FILE).write_text(config)
    with pytest.raises(InputError):
        Tokenizer.load(tmp_path)
