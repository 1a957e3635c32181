"""The exported tokenizer gives the ids of megamm's for any text; an imported one is the same again."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamm.convert import export_llava, import_llava
from megamm.convert.tokenizer import merges_of, tokenizer_from_hf, write_tokenizer
from megamm.data.tokenizer import CONFIG_FILE, IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError
from tests.convert.helpers import VOCAB_SIZE, recipe_for
from tests.data import huggingface


@pytest.fixture(scope="module")
def exported(llava_dir: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = import_llava(llava_dir)
    out = tmp_path_factory.mktemp("export") / "hf"
    export_llava(found.tensors, recipe_for(found.model), tokenizer_dir, out)
    return out


@pytest.fixture(scope="module")
def auto(exported: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exported)


FRAGMENTS = [
    "a",
    "-",
    " ",
    "  ",
    "\n",
    "aa",
    "the",
    " the",
    "picture",
    "USER:",
    "é",
    "日本",
    "😀",
    "\t",
    "\u2581",
    "0",
    "12",
]
FRAGMENTS += ["<image>", "\n<image>", "</s>", "<s>", "<unk>", "<0x0A>", "\x00", ".", "\u200b", "\r\n"]
TEXTS = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))


@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_ids_are_equal_for_any_text(auto, tokenizer, text):
    wanted = tokenizer.encode(text)
    assert auto.encode(text, add_special_tokens=False) == wanted
    assert auto.encode(text) == [tokenizer.bos_id, *wanted]
    assert auto(text).input_ids == tokenizer.encode(text, bos=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a  b",
        " leading",
        "<image>",
        "<image>text right behind",
        "<image>\nWhat is this?",
        "what <image> is\n\n<image>  this",
        "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: And? ASSISTANT:",
        "日本語 und Ümläute, 😀😀",
        "a" * 33 + "-" * 40,
    ],
)
def test_ids_are_equal_for_chosen_texts(auto, tokenizer, text):
    assert auto.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_repeated_characters(auto, tokenizer):
    """Runs of one character are where the order of merges would show."""
    source = random.Random(0)
    for _ in range(1500):
        text = "".join(
            source.choice("a- el0é") * source.randrange(1, 20) for _ in range(source.randrange(1, 6))
        )
        assert auto.encode(text, add_special_tokens=False) == tokenizer.encode(text)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_decoding_is_equal(auto, tokenizer, text):
    ids = [i for i in tokenizer.encode(text) if i not in tokenizer.special_tokens.values()]
    assert auto.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_special_tokens_have_their_ids(auto, tokenizer):
    assert (auto.bos_token_id, auto.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (auto.unk_token_id, auto.pad_token_id) == (tokenizer.unk_id, tokenizer.pad_id)
    assert auto.convert_tokens_to_ids(IMAGE_TOKEN) == tokenizer.image_id == VOCAB_SIZE - 1
    assert auto.image_token_id == tokenizer.image_id
    assert len(auto) == tokenizer.vocab_size


def test_merges_follow_the_scores():
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for piece, score, kind in [
        ("a", -9, 1),
        ("b", -9, 1),
        ("ab", -2, 1),
        ("ba", -1, 1),
        ("aba", -3, 1),
        ("bb", 0, 3),
    ]:
        model.pieces.add(piece=piece, score=score, type=kind)
    assert merges_of(model) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]


def test_an_exported_directory_gives_the_same_tokenizer(exported, tokenizer):
    assert tokenizer_from_hf(exported).sha256 == tokenizer.sha256


def copy_files(source: Path, out: Path, *names: str) -> Path:
    out.mkdir()
    for name in names:
        shutil.copy(source / name, out)
    return out


def test_added_tokens_come_from_any_generation_of_files(exported, tokenizer, tmp_path):
    """Without megamm's own description: tokenizer.json, tokenizer_config.json or added_tokens.json."""
    new = copy_files(exported, tmp_path / "new", "tokenizer.model", "tokenizer.json")
    assert tokenizer_from_hf(new).sha256 == tokenizer.sha256
    extra = {IMAGE_TOKEN: VOCAB_SIZE - 1, "<pad>": VOCAB_SIZE}
    middle = copy_files(exported, tmp_path / "middle", "tokenizer.model")
    decoder = {str(index): {"content": token, "special": True} for token, index in extra.items()}
    (middle / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder | {"0": {"content": "<unk>"}}})
    )
    assert tokenizer_from_hf(middle).added_tokens == extra
    old = copy_files(exported, tmp_path / "old", "tokenizer.model")
    (old / "added_tokens.json").write_text(json.dumps(extra))
    assert tokenizer_from_hf(old).added_tokens == extra


def test_the_image_token_follows_other_added_tokens(exported, tmp_path):
    directory = copy_files(exported, tmp_path / "pad", "tokenizer.model")
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": VOCAB_SIZE - 1}))
    assert tokenizer_from_hf(directory).image_id == VOCAB_SIZE


def test_more_added_tokens_are_exported(llava_dir, tmp_path):
    from transformers import AutoTokenizer

    model = (llava_dir / "tokenizer.model").read_bytes()
    tokenizer = Tokenizer(model, {IMAGE_TOKEN: VOCAB_SIZE - 1, "<pad>": VOCAB_SIZE, "<pa": VOCAB_SIZE + 1})
    tokenizer.save(tmp_path / "tokenizer")
    found = import_llava(llava_dir)
    found.model.language.vocab_size = VOCAB_SIZE + 2
    tensors = dict(found.tensors)
    for key in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        tensors[key] = tensors[key].repeat(2, 1)
    export_llava(tensors, recipe_for(found.model), tmp_path / "tokenizer", tmp_path / "out")
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the <pad><image><pa d <pa<pad"
    assert auto.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_contradicting_files_are_refused(exported, tmp_path):
    directory = copy_files(exported, tmp_path / "bad", "tokenizer.model", "tokenizer.json")
    (directory / "added_tokens.json").write_text(json.dumps({IMAGE_TOKEN: VOCAB_SIZE + 5}))
    with pytest.raises(InputError, match=r"tokenizer.json: <image> has id 419, elsewhere 425"):
        tokenizer_from_hf(directory)


@pytest.mark.parametrize("entry", [{"x": "y"}, {"x": None}, {"": 500}, {"x": True}])
def test_malformed_added_tokens_are_refused(entry, exported, tmp_path):
    directory = copy_files(exported, tmp_path / "bad", "tokenizer.model")
    (directory / "added_tokens.json").write_text(json.dumps(entry))
    with pytest.raises(InputError, match="no added token"):
        tokenizer_from_hf(directory)


def test_a_directory_without_a_tokenizer_gives_none(tmp_path):
    assert tokenizer_from_hf(tmp_path) is None


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_both_engines_give_the_same_ids(exported, tokenizer, text):
    """Without its SentencePiece model, the exported directory is read from its tokenizer.json."""
    found = both(exported)
    assert found.encode(text) == tokenizer.encode(text)
    assert found.encode_parts([text], prefix=False) == tokenizer.encode_parts([text], prefix=False)


@cache
def both(exported: Path) -> Tokenizer:
    directory = copy_files(exported, exported.parent / "json", "tokenizer.json", "tokenizer_config.json")
    found = tokenizer_from_hf(directory)
    assert found is not None and found.is_huggingface
    return found


def without_bytes(model):
    model.trainer_spec.byte_fallback = False
    for piece in model.pieces:
        piece.type = 1 if piece.type == 6 else piece.type


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.trainer_spec, "model_type", 1), "is no BPE model"),
        (without_bytes, "has no byte fallback"),
        (lambda model: setattr(model.pieces[300], "type", 4), "has user-defined pieces"),
    ],
)
def test_other_kinds_of_models_are_not_exported(change, message, llava_dir, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((llava_dir / "tokenizer.model").read_bytes())
    change(model)
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    found = import_llava(llava_dir)
    with pytest.raises(InputError, match=message):
        export_llava(found.tensors, recipe_for(found.model), directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (directory / CONFIG_FILE).exists()


@pytest.mark.parametrize("kind", ["prepend", "qwen"])
def test_a_huggingface_tokenizer_goes_out_as_it_came(kind, llava_dir, tmp_path):
    from transformers import AutoTokenizer

    source = huggingface.write(kind, tmp_path / "hf")
    ours = Tokenizer.load(source)  # with <image>
    ours.save(source)
    found = import_llava(llava_dir)
    found.model.language.vocab_size = ours.vocab_size
    tensors = dict(found.tensors)
    for key in ("language.embedding.word_embeddings.weight", "language.output_layer.weight"):
        tensors[key] = tensors[key].repeat(3, 1)[: ours.vocab_size]
    assert tokenizer_from_hf(source).sha256 == ours.sha256
    export_llava(tensors, recipe_for(found.model), source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert import_llava(tmp_path / "out").tokenizer.sha256 == ours.sha256
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<image>\nthe dog's leash <|im_end|></s>"
    assert auto.encode(text, add_special_tokens=False) == ours.encode(text)


def test_a_bare_tokenizer_json_gets_its_settings(tmp_path):
    from transformers import AutoTokenizer

    ours = Tokenizer.load(huggingface.write("first", tmp_path / "hf") / "tokenizer.json")
    write_tokenizer(ours, tmp_path / "out", 64, has_images=False)
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (1, 2, 0)
    assert len(auto) == ours.vocab_size - 1  # without <image>
    assert auto.encode("a dog</s>", add_special_tokens=False) == ours.encode("a dog</s>")
