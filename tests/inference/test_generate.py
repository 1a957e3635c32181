"""From conversations and pictures to the text of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.data.templates import Turn
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.inference import Decoding, Model
from tests.inference.conftest import NUM_UNKNOWN, VOCAB_SIZE

TEXTS = ("<image>\nwhat is shown?", "describe a red circle", "<image><image>\ncat or dog?")


def ask(model: Model, pictures: list[Path], **options: Any) -> list[str]:
    conversations = [[Turn("user", text)] for text in TEXTS]
    files = [pictures[:1], [], pictures]
    return model.generate(conversations, files, **options)


def test_a_batch_is_as_good_as_one_at_a_time(model: Model, pictures: list[Path]) -> None:
    together = ask(model, pictures, max_new_tokens=6)
    alone = [
        model.generate([[Turn("user", text)]], [pictures[: text.count("<image>")]], max_new_tokens=6)[0]
        for text in TEXTS
    ]
    assert together == alone and len(set(together)) == 3 and all(together)


def test_answers_follow_the_logits(model: Model, tokenizer: Tokenizer) -> None:
    """Token by token what the largest logit says, whatever the template."""
    prompt = model.asking().prompt([Turn("user", TEXTS[1])])
    assert prompt == tokenizer.encode(model.template.prompt_text([Turn("user", TEXTS[1])]), bos=True)
    sequence = list(prompt)
    for _ in range(5):
        sequence.append(int(model.logits(torch.tensor([sequence]))[0, -1].argmax()))
    wanted = sequence[len(prompt) :]
    assert tokenizer.eos_id not in wanted
    assert model.generate([[Turn("user", TEXTS[1])]], [[]], max_new_tokens=5) == [
        tokenizer.decode(wanted).strip()
    ]


def test_earlier_turns_are_part_of_the_prompt(model: Model, pictures: list[Path]) -> None:
    history = [Turn("user", TEXTS[0]), Turn("assistant", "a cat"), Turn("user", "and now <image>?")]
    span, image_id = model.recipe.model.tokens_per_image, model.tokenizer.image_id
    assert model.asking().prompt(history).count(image_id) == 2 * span
    (answer,) = model.generate([history], [pictures], max_new_tokens=4)
    assert answer != model.generate([history[:1]], [pictures[:1]], max_new_tokens=4)[0]


def test_nothing_to_answer(model: Model) -> None:
    assert model.generate([], []) == []


def test_counts_are_checked(model: Model, pictures: list[Path]) -> None:
    question = [Turn("user", TEXTS[0])]
    with pytest.raises(InputError, match="conversation 1: 1 <image> placeholders, but 2 pictures"):
        model.generate([question, question], [pictures[:1], pictures])
    with pytest.raises(InputError, match="conversation 0: 1 <image> placeholders, but 0 pictures"):
        model.generate([question], [[]])
    with pytest.raises(InputError, match="2 conversations, but images for 1"):
        model.generate([question, question], [pictures[:1]])


def test_prompts_that_do_not_fit(model: Model) -> None:
    long = [Turn("user", "red circle " * 200)]
    with pytest.raises(
        InputError, match=r"a prompt of \d+ positions and 4 new tokens exceed the model's 256"
    ):
        model.generate([long], [[]], max_new_tokens=4)
    with pytest.raises(InputError, match="300 new tokens exceed the model's 256 positions"):
        model.generate([[Turn("user", "hi")]], [[]], max_new_tokens=300)


def test_a_question_comes_last(model: Model) -> None:
    with pytest.raises(InputError, match="the last turn must be a question"):
        model.generate([[Turn("user", "hi"), Turn("assistant", "ho")]], [[]])


def test_bad_pictures_are_named(model: Model, tmp_path: Path) -> None:
    question = [Turn("user", TEXTS[0])]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(InputError, match=str(broken)):
        model.generate([question], [[broken]])
    with pytest.raises(InputError, match=str(tmp_path / "missing.png")):
        model.generate([question], [[tmp_path / "missing.png"]])


def test_what_is_in_a_file_is_a_picture_too(model: Model, pictures: list[Path]) -> None:
    question = [Turn("user", TEXTS[0])]
    (wanted,) = model.generate([question], [pictures[:1]], max_new_tokens=4)
    assert model.generate([question], [[pictures[0].read_bytes()]], max_new_tokens=4) == [wanted]
    with pytest.raises(InputError, match=r"the picture: .*give another image"):
        model.generate([question], [[b"no picture"]])


def test_raw_prompts_stand_as_they_are(model: Model, tokenizer: Tokenizer, pictures: list[Path]) -> None:
    """The template's text, given as it is, has the template's answer."""
    text = model.template.prompt_text([Turn("user", TEXTS[0])])
    asking = model.asking()
    assert asking.raw_prompt(text) == asking.prompt([Turn("user", TEXTS[0])])
    decoding = Decoding(max_new_tokens=5)
    (wanted,) = model.generate([[Turn("user", TEXTS[0])]], [pictures[:1]], decoding=decoding)
    assert model.complete([text], [pictures[:1]], decoding) == [wanted]
    with pytest.raises(InputError, match="conversation 0: 1 <image> placeholders, but 2 pictures"):
        model.complete([text], [pictures], decoding)


def test_a_listener_hears_the_answer_grow(model: Model, pictures: list[Path]) -> None:
    heard: dict[int, list[str]] = {}
    conversations = [[Turn("user", text)] for text in TEXTS]
    answers = model.generate(
        conversations,
        [pictures[:1], [], pictures],
        max_new_tokens=6,
        listener=lambda row, text: heard.setdefault(row, []).append(text),
    )
    for row, answer in enumerate(answers):
        assert heard[row][-1] == answer and len(heard[row]) > 1
        assert all(answer.startswith(part.rstrip("\ufffd")) for part in heard[row])


def test_only_text_is_generated(model: Model, tokenizer: Tokenizer) -> None:
    """An image placeholder without an image, or an id that the tokenizer does not have, is no answer."""
    words = model.asking().words
    scores = words.silence(torch.zeros(1, VOCAB_SIZE + NUM_UNKNOWN))
    said = torch.isfinite(scores[0]).nonzero().flatten().tolist()
    assert said == [token for token in range(tokenizer.vocab_size) if token != tokenizer.image_id]
