"""Golden renderings: what is learnt is spelled out between [ and ]."""

from __future__ import annotations

import random

import pytest

from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def user(text: str) -> Turn:
    return Turn("user", text)


def assistant(text: str) -> Turn:
    return Turn("assistant", text)


def marked(template: str, turns: list[Turn], tokenizer: Tokenizer) -> str:
    """The decoded rendering with [ ] around every stretch of learnt tokens."""
    ids, mask = Template.by_name(template).render(turns, tokenizer)
    assert len(ids) == len(mask)
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:
            # Decoded behind an <image>, so that the first space of the stretch stays.
            part = tokenizer.decode([tokenizer.image_id, *ids[start:end]], skip_special=False)
            part = part.removeprefix("<image>")
            text += f"[{part}]" if mask[start] else part
            start = end
    return text


GOLDEN = [
    (
        "vicuna",
        [user("<image>\nWhat is it?"), assistant("A dog.")],
        f"<s> {SYSTEM}USER: <image>\nWhat is it? ASSISTANT:[ A dog.</s>]",
    ),
    (
        "vicuna",
        [user("Who?\n<image>"), assistant("Me."), user("Why?"), assistant("So.")],
        f"<s> {SYSTEM}USER: <image>\nWho? ASSISTANT:[ Me.</s>]USER: Why? ASSISTANT:[ So.</s>]",
    ),
    (
        "vicuna",
        [user("Is <image> like <image>?"), assistant("No.")],
        f"<s> {SYSTEM}USER: <image>\n<image>\nIs  like ? ASSISTANT:[ No.</s>]",
    ),
    ("vicuna", [user(" Hi "), assistant("")], f"<s> {SYSTEM}USER:  Hi  ASSISTANT:[ </s>]"),
    ("plain", [user("<image>\nDescribe it."), assistant("a dog")], "<s><image>[a dog\n]"),
    ("plain", [user("Describe\n<image>\n<image>"), assistant("dogs")], "<s><image><image>[dogs\n]"),
    ("plain", [user("Tell me."), assistant("a story")], "<s>[ a story\n]"),
]


@pytest.mark.parametrize("name, turns, wanted", GOLDEN)
def test_golden(name: str, turns: list[Turn], wanted: str, tokenizer: Tokenizer) -> None:
    assert marked(name, turns, tokenizer) == wanted


def test_ids_equal_those_of_the_whole_text(tokenizer: Tokenizer) -> None:
    """Rendering turn by turn changes no id, whatever the turns begin and end with."""
    draw = random.Random(0)
    words = ["the", " dog", "  ", "\n", "12", "<image>", "é", ":", " A", "</s>", "ASSISTANT:"]
    for _ in range(300):
        turns = []
        for _ in range(draw.randint(1, 3)):
            turns.append(user("".join(draw.choices(words, k=draw.randint(0, 6)))))
            turns.append(assistant("".join(draw.choices(words, k=draw.randint(0, 6)))))
        for name, conversation in (("vicuna", turns), ("plain", turns[:2])):
            template = Template.by_name(name)
            ids, mask = template.render(conversation, tokenizer)
            text = "".join(segment.text for segment in template.segments(conversation))
            assert ids == tokenizer.encode(text, bos=True)
            assert not any(learnt for i, learnt in zip(ids, mask, strict=True) if i == tokenizer.image_id)


def test_prompt_is_the_beginning_of_the_training_text(tokenizer: Tokenizer) -> None:
    turns = [user("<image>\nWhat is it?"), assistant("A dog."), user("Sure?"), assistant("Yes.")]
    for name, length in (("vicuna", 1), ("vicuna", 3), ("plain", 1)):
        template = Template.by_name(name)
        prompt = template.prompt(turns[:length], tokenizer)
        ids, mask = template.render(turns[: length + 1], tokenizer)
        assert ids[: len(prompt)] == prompt
        assert all(mask[len(prompt) :]) and not mask[len(prompt) - 1]
    assert Template.by_name("vicuna").prompt_text(turns[:1]).endswith("What is it? ASSISTANT:")


def test_stop_tokens(tokenizer: Tokenizer) -> None:
    assert Template.by_name("vicuna").stop_ids(tokenizer) == [tokenizer.eos_id]
    newline = tokenizer.encode("\n", prefix=False)
    assert Template.by_name("plain").stop_ids(tokenizer) == sorted([tokenizer.eos_id, *newline])


def test_bad_conversations(tokenizer: Tokenizer) -> None:
    vicuna, plain = Template.by_name("vicuna"), Template.by_name("plain")
    with pytest.raises(InputError, match="must alternate"):
        vicuna.render([user("a"), user("b")], tokenizer)
    with pytest.raises(InputError, match="must alternate"):
        vicuna.render([assistant("a")], tokenizer)
    with pytest.raises(InputError, match="use the template vicuna"):
        plain.render([user("a"), assistant("b"), user("c"), assistant("d")], tokenizer)
    with pytest.raises(InputError, match="last turn must be a question"):
        vicuna.prompt([user("a"), assistant("b")], tokenizer)
    with pytest.raises(InputError, match="choose one of vicuna, plain"):
        Template.by_name("chatml")
