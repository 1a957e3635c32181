"""tokenizer.json: the ids of transformers, control tokens out of users' reach, round trips, bad files."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from tests.data import huggingface

FRAGMENTS = [
    *(
        "a",
        " ",
        "  ",
        "\n",
        "\n\n",
        "the",
        " the",
        "dog's",
        "USER:",
        " ASSISTANT:",
        "é",
        "e\u0301",
        "日本",
        "😀",
    ),
    *(
        "\t",
        "\u2581",
        "0",
        "12",
        "<image>",
        "\n<image>",
        " <image> ",
        "</s>",
        "<s>",
        "<unk>",
        "<0x0A>",
        "\x00",
    ),
    *("<|endoftext|>", "<|im_end|>", "<|im_start|>", "[/INST]", "<|", ".", "\r\n", "\u200b"),
]
WORDS = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))


@pytest.fixture(scope="module", params=huggingface.KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer of the directory that ours saved, and ours."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp(request.param)
    ours = Tokenizer.load(huggingface.write(request.param, root / "hf"))
    ours.save(root / "saved")
    return AutoTokenizer.from_pretrained(root / "saved"), ours


@settings(max_examples=150, deadline=None)
@given(text=WORDS)
def test_ids_are_those_of_transformers(pair: tuple[Any, Tokenizer], text: str) -> None:
    auto, ours = pair
    assert ours.encode(text) == auto.encode(text, add_special_tokens=False)


@settings(max_examples=50, deadline=None)
@given(text=WORDS)
def test_decoding_is_that_of_transformers(pair: tuple[Any, Tokenizer], text: str) -> None:
    auto, ours = pair
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == auto.decode(ids, skip_special_tokens=skip)


def test_control_tokens(pair: tuple[Any, Tokenizer]) -> None:
    auto, ours = pair
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (
        auto.bos_token_id,
        auto.eos_token_id,
        auto.unk_token_id,
    )
    assert ours.pad_id == next(
        i for i in (auto.pad_token_id, auto.unk_token_id, auto.eos_token_id) if i is not None
    )
    assert ours.image_id == auto.convert_tokens_to_ids("<image>") == ours.vocab_size - 1 == len(auto) - 1
    begin = [] if ours.bos_id is None else [ours.bos_id]
    assert ours.encode("a", bos=True) == begin + ours.encode("a")


@settings(max_examples=100, deadline=None)
@given(text=WORDS)
def test_words_of_a_user_never_become_control_tokens(pair: tuple[Any, Tokenizer], text: str) -> None:
    auto, ours = pair
    controls = set(ours.special_tokens.values()) - {ours.unk_id}
    assert ours.encode_parts([text]) == auto.encode(text, add_special_tokens=False, split_special_tokens=True)
    for prefix in (True, False):
        ids = ours.encode_parts([text], prefix)
        assert controls.isdisjoint(ids)
        if not any(name in text for name in ours.special_tokens):
            assert ids == ours.encode(text, prefix=prefix)


def test_a_text_in_pieces_has_the_ids_of_the_whole(pair: tuple[Any, Tokenizer]) -> None:
    """No second word-start marker where a piece continues another."""
    _, ours = pair
    for first, second in (
        ("USER: why? ASSISTANT:", " Because."),
        ("<image>\nWhat", " is it?"),
        ("a b", "\n<image>c d"),
    ):
        assert ours.encode(first) + ours.encode(second, prefix=False) == ours.encode(first + second)
        assert ours.encode_parts([*ours.cut(first), *ours.cut(second)]) == ours.encode(first + second)


def test_round_trips(pair: tuple[Any, Tokenizer], tmp_path: Path) -> None:
    _, ours = pair
    ours.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for name, contents in ours.files().items():
        assert (tmp_path / "b" / name).read_bytes() == contents
    sent = pickle.loads(pickle.dumps(ours))
    for other in (again, sent):
        assert other.sha256 == ours.sha256 and other.files() == ours.files()
        assert other.encode("the dog<image> runs</s>") == ours.encode("the dog<image> runs</s>")


def test_new_tokens_come_before_the_image(tmp_path: Path) -> None:
    source = huggingface.write("prepend", tmp_path / "hf")
    size = len(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"])
    ours = Tokenizer.load(source, ["<|endofchunk|>", "<x>"])
    assert ours.added_tokens == {"<|endofchunk|>": size, "<x>": size + 1, "<image>": size + 2}
    assert ours.encode("<|endofchunk|><image>") == [size, size + 2]
    with pytest.raises(InputError, match=r"--add-token: '</s>' is a token of .*tokenizer.json already"):
        Tokenizer.load(source, ["</s>"])


def test_a_bare_file_and_named_roles(tmp_path: Path) -> None:
    source = huggingface.write("first", tmp_path / "hf")
    bare, whole = Tokenizer.load(source / "tokenizer.json"), Tokenizer.load(source)
    assert (bare.bos_id, bare.eos_id, bare.unk_id) == (whole.bos_id, whole.eos_id, whole.unk_id) == (1, 2, 0)
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    changed = Tokenizer.load(source)
    assert (changed.bos_id, changed.eos_id) == (None, 1) and changed.sha256 != whole.sha256
    (source / "tokenizer_config.json").unlink()
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<unk>"}))
    assert Tokenizer.load(source).eos_id == 2


FAR = {"id": 9999, "content": "<far>", "single_word": False, "lstrip": False, "rstrip": False}
FAR |= {"normalized": False, "special": True}


def change(source: Path, edit: Any) -> None:
    path = source / "tokenizer.json"
    contents = json.loads(path.read_text())
    edit(contents)
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "is no BPE tokenizer"),
        (lambda c: c["model"]["vocab"].update(a=1 << 40), "is no BPE tokenizer"),
        (lambda c: c["model"]["merges"].append(["never", "there"]), "tokenizers library refuses it"),
        (lambda c: c["added_tokens"].append(FAR), "cannot have the id 9999"),
        (lambda c: c["added_tokens"][1].update(rstrip=True), "'<s>' takes spaces or words around it"),
        (lambda c: c["added_tokens"].append({"id": "1", "content": "<s>"}), "is no added token"),
        (lambda c: c.update(normalizer={"type": "Precompiled"}), "normalizer 'Precompiled' is not known"),
        (lambda c: c.update(pre_tokenizer=[1]), "is no part of a tokenizer"),
        (lambda c: c.update(added_tokens={}), "added_tokens is no list"),
    ],
)
def test_bad_contents(edit: Any, message: str, tmp_path: Path) -> None:
    source = huggingface.write("first", tmp_path / "hf")
    change(source, edit)
    with pytest.raises(InputError, match=message):
        Tokenizer.load(source)


def test_bad_companions(tmp_path: Path) -> None:
    source = huggingface.write("qwen", tmp_path / "hf")
    for settings_text, message in (
        ("[", "is no JSON object"),
        ('{"eos_token": 5}', "eos_token is 5"),
        ('{"eos_token": "<nowhere>"}', "'<nowhere>' has no id"),
        ("{}", "nothing says which token ends a text"),
        (
            '{"eos_token": "<|im_end|>", "added_tokens_decoder": {"7": {"content": "<far>"}}}',
            "<far> has no id in tokenizer.json",
        ),
    ):
        (source / "tokenizer_config.json").write_text(settings_text)
        with pytest.raises(InputError, match=message):
            Tokenizer.load(source)
