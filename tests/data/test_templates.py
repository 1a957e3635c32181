"""Every template against its text as written out by hand, encoded by transformers; what is learnt stands
between [[ and ]]."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import sentencepiece
import yaml

from megamm.config import TemplateName
from megamm.data.templates import PRESETS, Template, Turn, load_templates
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from tests.data import huggingface

NEW_TOKENS = ["<|endofchunk|>", "<TOKENS_UNUSED_0>", "<TOKENS_UNUSED_1>"]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
META = (
    "meta instruction\nYou are an AI assistant whose name is 浦语.\n- 浦语 is a conversational language "
    "model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, "
    "honest, and harmless.\n- 浦语 can understand and communicate fluently in the language chosen by the "
    "user such as English and 中文.\nconversation\n"
)
EMPTY = "<|system|>\n</s>\n"


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


def system(text: str) -> Turn:
    return Turn("system", text)


def document(text: str) -> list[Turn]:
    return [Turn("document", text)]


ONE = [user("<image>\nWhat is it?"), assistant("A dog.")]
TWO = [user("Who?\n<image>"), assistant("Me."), user("Why?"), assistant("So.")]
IMAGES = [user("Is <image> like\n<image>?"), assistant("No.")]
BRIEF = [system("Be brief."), user(" Hi "), assistant("")]

WRITTEN = [
    ("plain", [user("<image>\nDescribe it."), assistant("a dog")], "<image>[[a dog\n]]"),
    ("plain", [user("Describe\n<image>\n<image>"), assistant("dogs")], "<image><image>[[dogs\n]]"),
    ("plain", [user("Tell me."), assistant("a story")], "[[a story\n]]"),
    ("vicuna", ONE, VICUNA + "USER: <image>\nWhat is it? ASSISTANT:[[ A dog.</s>]]"),
    ("vicuna", TWO, VICUNA + "USER: <image>\nWho? ASSISTANT:[[ Me.</s>]]USER: Why? ASSISTANT:[[ So.</s>]]"),
    ("vicuna", IMAGES, VICUNA + "USER: <image>\n<image>\nIs  like\n? ASSISTANT:[[ No.</s>]]"),
    ("vicuna", BRIEF, "Be brief. USER:  Hi  ASSISTANT:[[ </s>]]"),
    ("llama2_chat", ONE, "[INST] <image>\nWhat is it? [/INST][[ A dog. </s>]]"),
    (
        "llama2_chat",
        TWO,
        "[INST] <image>\nWho? [/INST][[ Me. </s>]]<s> [INST] Why? [/INST][[ So. </s>]]",
    ),
    ("llama2_chat", BRIEF, "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi  [/INST][[  </s>]]"),
    ("zephyr", ONE, "<|user|>\n<image>\nWhat is it?</s>\n<|assistant|>\n[[A dog.</s>]]\n"),
    (
        "zephyr",
        TWO,
        "<|user|>\n<image>\nWho?</s>\n<|assistant|>\n[[Me.</s>]]\n<|user|>\nWhy?</s>\n<|assistant|>\n[[So.</s>]]\n",
    ),
    ("zephyr", BRIEF, "<|system|>\nBe brief.</s>\n<|user|>\n Hi </s>\n<|assistant|>\n[[</s>]]\n"),
    (
        "infimm",
        ONE,
        EMPTY + "<|user|>\n<|endofchunk|><image>What is it?</s>\n<|assistant|>\n[[A dog.</s>]]\n",
    ),
    (
        "infimm",
        IMAGES,
        EMPTY
        + "<|user|>\nIs<|endofchunk|><image>like<|endofchunk|><image>?</s>\n<|assistant|>\n[[No.</s>]]\n",
    ),
    (
        "infimm",
        TWO,
        EMPTY + "<|user|>\nWho?<|endofchunk|><image></s>\n<|assistant|>\n[[Me.</s>]]\n"
        "<|user|>\nWhy?</s>\n<|assistant|>\n[[So.</s>]]\n",
    ),
    ("infimm", BRIEF, "<|system|>\nBe brief.</s>\n<|user|>\n Hi </s>\n<|assistant|>\n[[</s>]]\n"),
    (
        "xcomposer",
        ONE,
        META + " <|User|>:<image>What is it?\n<TOKENS_UNUSED_0> <|Bot|>:[[A dog.<TOKENS_UNUSED_1> </s>]]",
    ),
    (
        "xcomposer",
        TWO,
        META + " <|User|>:<image>Who?\n<TOKENS_UNUSED_0> <|Bot|>:[[Me.<TOKENS_UNUSED_1> </s>]]"
        " <|User|>:Why?\n<TOKENS_UNUSED_0> <|Bot|>:[[So.<TOKENS_UNUSED_1> </s>]]",
    ),
    (
        "xcomposer",
        BRIEF,
        "meta instruction\nBe brief.\nconversation\n <|User|>: Hi \n<TOKENS_UNUSED_0> <|Bot|>:"
        "[[<TOKENS_UNUSED_1> </s>]]",
    ),
    ("pair", [user("<image>"), assistant("A dog.")], "<image>[[A dog.<|endofchunk|></s>]]"),
    ("pair", [user("Look!\n<image>"), assistant("")], "<image>[[<|endofchunk|></s>]]"),
    (
        "interleaved",
        document("Before <image> a dog. <image>\nTwo cats.\n\nMore <image>"),
        "Before<image>[[a dog.<|endofchunk|>]]<image>[[Two cats.\n\nMore<|endofchunk|>]]<image>"
        "[[<|endofchunk|>]]</s>",
    ),
    ("interleaved", document("<image><image> x"), "<image>[[<|endofchunk|>]]<image>[[x<|endofchunk|>]]</s>"),
    ("interleaved", document("No image."), "No image.<|endofchunk|></s>"),
    ("text", document("Once upon\n a time."), "[[Once upon\n a time.</s>]]"),
]


@pytest.fixture(scope="module", params=["first", "prepend", "qwen"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """transformers' tokenizer and ours, with the tokens that templates need."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp(request.param)
    ours = Tokenizer.load(huggingface.write(request.param, root / "hf"), NEW_TOKENS)
    ours.save(root / "saved")
    return AutoTokenizer.from_pretrained(root / "saved"), ours


def expected(written: str, auto: Any) -> tuple[list[int], list[bool]]:
    """Ids of the whole text, and of each whether its characters stand between [[ and ]]."""
    written = written.replace("</s>", auto.eos_token).replace("<s>", auto.bos_token or "")
    pieces = re.split(r"(\[\[|\]\])", written)
    text, spans = "", []
    for piece in pieces:
        if piece == "[[":
            spans.append([len(text), 0])
        elif piece == "]]":
            spans[-1][1] = len(text)
        else:
            text += piece
    found = auto(text, add_special_tokens=False, return_offsets_mapping=True)
    image = auto.convert_tokens_to_ids("<image>")
    mask = [
        token != image and any(start <= a and b <= end for start, end in spans)
        for token, (a, b) in zip(found.input_ids, found.offset_mapping, strict=True)
    ]
    begin = [] if auto.bos_token_id is None else [auto.bos_token_id]
    return begin + found.input_ids, [False] * len(begin) + mask


@pytest.mark.parametrize(("name", "turns", "written"), WRITTEN)
def test_ids_and_mask(name: str, turns: list[Turn], written: str, pair: tuple[Any, Tokenizer]) -> None:
    auto, ours = pair
    ids, mask = Template.by_name(name).render(turns, ours)
    wanted_ids, wanted_mask = expected(written, auto)
    assert ids == wanted_ids
    assert mask == wanted_mask


def test_every_template_is_written_out_and_offered() -> None:
    names = list(yaml.safe_load(PRESETS.read_text(encoding="utf-8")))
    assert sorted({name for name, _, _ in WRITTEN}) == sorted(names) == sorted(get_args(TemplateName))


CONVERSATIONAL = ("vicuna", "llama2_chat", "zephyr", "infimm", "xcomposer")


def test_words_of_a_turn_are_never_control_tokens(pair: tuple[Any, Tokenizer]) -> None:
    """A turn that spells control tokens is rendered like any other text, and its text survives."""
    _, ours = pair
    names = [*NEW_TOKENS, "</s>", "<s>", "<|im_end|>", "<unk>", "<|user|>", "USER:", "[INST]"]
    spelled = "Say " + " ".join(names) + " now"
    tame = re.sub(r"[<>]", "x", spelled)
    controls = set(ours.special_tokens.values())
    for template in (Template.by_name(name) for name in get_args(TemplateName)):
        rendered = []
        for text in (spelled, tame):
            turns = document(text) if template.takes == "document" else [user(text), assistant(text)]
            ids, mask = template.render(turns, ours)
            rendered.append([(i, m) for i, m in zip(ids, mask, strict=True) if i in controls])
            assert text in ours.decode(ids, skip_special=False)
        assert rendered[0] == rendered[1]


def test_a_user_defined_piece_is_no_control_token_in_a_turn(tokenizer_dir: Path, tmp_path: Path) -> None:
    """InternLM's unused pieces are user-defined: SentencePiece takes their names for them."""
    corpus = ["USER: what is it? <|User|>: <|Bot|>: A dog and two cats."] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        user_defined_symbols=NEW_TOKENS[1:],
        minloglevel=2,
    )
    ours = Tokenizer.load(tmp_path / "m.model")
    first, second = (ours.token_id(text) for text in NEW_TOKENS[1:])
    template = Template.by_name("xcomposer")
    ids, mask = template.render([user("a<TOKENS_UNUSED_0>b"), assistant("c <TOKENS_UNUSED_1>")], ours)
    assert (ids.count(first), ids.count(second)) == (1, 1)
    assert "a<TOKENS_UNUSED_0>b" in ours.decode(ids[: ids.index(first)])
    after = ids[ids.index(first) :]
    learnt = mask[ids.index(first) :]
    # SPECS: the end of the question and " <|Bot|>:" are masked, the answer, its end and </s> are learnt
    length = 1 + len(ours.encode(" <|Bot|>:", prefix=False))
    assert learnt == [False] * length + [True] * (len(after) - length)
    assert after[-1] == ours.eos_id and second in after[length:]
    assert template.stop_ids(ours) == sorted([ours.eos_id, first, second])


def test_ids_equal_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    """Rendering turn by turn changes no id, whatever the turns begin and end with."""
    draw = random.Random(0)
    words = ["the", " dog", "  ", "\n", "12", "<image>", "é", ":", " A", "ASSISTANT:"]
    for _ in range(300):
        turns = []
        for _ in range(draw.randint(1, 3)):
            turns.append(user("".join(draw.choices(words, k=draw.randint(0, 6)))))
            turns.append(assistant("".join(draw.choices(words, k=draw.randint(0, 6)))))
        for name, conversation in (("vicuna", turns), ("zephyr", turns), ("plain", turns[:2])):
            template = Template.by_name(name)
            ids, mask = template.render(conversation, tokenizer)
            text = "".join(segment.text for segment in template.segments(conversation))
            assert ids == tokenizer.encode(text, bos=True)
            assert not any(learnt for i, learnt in zip(ids, mask, strict=True) if i == tokenizer.image_id)


def test_prompt_is_the_beginning_of_the_training_text(pair: tuple[Any, Tokenizer]) -> None:
    _, ours = pair
    turns = [user("<image>\nWhat is it?"), assistant("A dog."), user("Sure?"), assistant("Yes.")]
    for name, length in [("plain", 1), ("pair", 1), *((name, n) for name in CONVERSATIONAL for n in (1, 3))]:
        template = Template.by_name(name)
        prompt = template.prompt(turns[:length], ours)
        ids, mask = template.render(turns[: length + 1], ours)
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt)] and not mask[len(prompt) - 1]
        assert "".join(s.text for s in template.segments(turns[:length])) == template.prompt_text(
            turns[:length]
        )
    assert Template.by_name("vicuna").prompt_text(turns[:1]).endswith("What is it? ASSISTANT:")


def test_stop_tokens(pair: tuple[Any, Tokenizer]) -> None:
    _, ours = pair
    chunk, question, answer = (ours.special_tokens[text] for text in NEW_TOKENS)
    newline = ours.encode("\n", prefix=False)
    for name, more in (
        *((name, []) for name in CONVERSATIONAL[:-1]),
        ("xcomposer", [question, answer]),
        ("pair", [chunk]),
        ("plain", newline),
    ):
        assert Template.by_name(name).stop_ids(ours) == sorted([ours.eos_id, *more])


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("vicuna", [user("a"), user("b")], "must alternate"),
        ("vicuna", [assistant("a")], "must alternate"),
        ("vicuna", [user("a"), system("b")], "must alternate"),
        ("plain", TWO, "template plain: a caption is one .*use the template vicuna"),
        ("pair", TWO, "template pair: a caption is one .*use the template infimm"),
        ("plain", BRIEF, "template plain: has no place for a system message; use the template vicuna"),
        ("vicuna", document("a"), "takes questions and answers, not a document; use the template text"),
        ("pair", document("<image>"), "takes an image and its caption, .*use the template interleaved"),
        ("interleaved", ONE, "takes a document, not questions and answers; use the template infimm"),
        ("text", ONE, "takes a document, not questions and answers; use the template vicuna"),
        ("text", document("<image>"), "the document has images; use the template interleaved"),
    ],
)
def test_what_a_template_does_not_take(
    name: str, turns: list[Turn], message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(InputError, match=message):
        Template.by_name(name).segments(turns)


def test_bad_use(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="last turn must be a question"):
        Template.by_name("vicuna").prompt(ONE, tokenizer)
    with pytest.raises(InputError, match="takes a document, not questions"):
        Template.by_name("text").prompt([user("a")], tokenizer)
    with pytest.raises(InputError, match="choose one of vicuna, plain, llama2_chat"):
        Template.by_name("chatml")
    with pytest.raises(InputError, match=r"no token <\|endofchunk\|>; add it with `megamm prepare tokenizer"):
        Template.by_name("infimm").render(ONE, tokenizer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("takes: pair\nasnwer: x", "there is no key 'asnwer'"),
        ("name: x\ntakes: pair", "there is no key 'name'"),
        ("answer: x", "takes is missing"),
        ("takes: page", "t.takes: is 'page'; give conversation or pair or document"),
        ("takes: pair\nanswer: 5", "t.answer: is 5; give a text"),
        ("takes: pair\nstop: x", "t.stop: is 'x'; give a list"),
        ("takes: pair\nanswer: '{question}'", "t.answer: has other fields than answer"),
        ("takes: document\nlearnt: chunks", "t.tokens: is empty"),
        ("[]", "is no mapping"),
    ],
)
def test_bad_template_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "templates.yaml"
    path.write_text("t:\n" + "\n".join("  " + line for line in text.splitlines()))
    with pytest.raises(InputError, match=message):
        load_templates(path)
