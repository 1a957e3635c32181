"""Greedy answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megamm.data.templates import Turn
from megamm.data.tokenizer import Tokenizer
from megamm.errors import InputError
from megamm.inference import Model

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
    prompt = model._asking().prompt([Turn("user", TEXTS[1])])
    assert prompt == tokenizer.encode(model.template.prompt_text([Turn("user", TEXTS[1])]), bos=True)
    sequence = list(prompt)
    for _ in range(5):
        sequence.append(int(model.logits(torch.tensor([sequence]))[0, -1].argmax()))
    wanted = sequence[len(prompt) :]
    assert tokenizer.eos_id not in wanted
    assert model._asking().greedy([prompt], model._next_logits(None), 5) == [wanted]
    assert model.generate([[Turn("user", TEXTS[1])]], [[]], max_new_tokens=5) == [
        tokenizer.decode(wanted).strip()
    ]


def test_earlier_turns_are_part_of_the_prompt(model: Model, pictures: list[Path]) -> None:
    history = [Turn("user", TEXTS[0]), Turn("assistant", "a cat"), Turn("user", "and now <image>?")]
    span, image_id = model.recipe.model.tokens_per_image, model.tokenizer.image_id
    assert model._asking().prompt(history).count(image_id) == 2 * span
    (answer,) = model.generate([history], [pictures], max_new_tokens=4)
    assert answer != model.generate([history[:1]], [pictures[:1]], max_new_tokens=4)[0]


class Scripted:
    """Logits that say given tokens, one list for each row, counted from the end of its prompt."""

    def __init__(self, model: Model, prompts: list[list[int]], answers: list[list[int]]) -> None:
        self.vocab_size = model.recipe.model.language.vocab_size
        self.starts, self.answers = [len(prompt) for prompt in prompts], answers
        self.num_calls = 0

    def __call__(self, input_ids: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        self.num_calls += 1
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, (start, answer) in enumerate(zip(self.starts, self.answers, strict=True)):
            for offset, token in enumerate(answer):
                if start - 1 + offset < input_ids.shape[1]:
                    logits[row, start - 1 + offset, token] = 1.0
        return logits


@pytest.fixture
def scripted(model: Model, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def replace_logits(prompts: list[list[int]], answers: list[list[int]]) -> Scripted:
        script = Scripted(model, prompts, answers)
        monkeypatch.setattr(model, "logits", script)
        return script

    return replace_logits


def test_each_row_stops_at_its_stop_token(
    model: Model, tokenizer: Tokenizer, scripted: Callable[..., Scripted]
) -> None:
    prompts = [[1, 300, 301], [1, 302, 303, 304, 305], [1]]
    eos = tokenizer.eos_id
    script = scripted(prompts, [[310, 311, eos, 312, 313], [eos], [320, 321, 322, eos]])
    assert model._asking().greedy(prompts, model._next_logits(None), 50) == [[310, 311], [], [320, 321, 322]]
    assert script.num_calls == 4  # nothing is computed after the last row has stopped
    assert [len(prompt) for prompt in prompts] == [3, 5, 1]  # the caller's lists are its own


def test_at_most_max_new_tokens(model: Model, scripted: Callable[..., Scripted]) -> None:
    script = scripted([[1, 300]], [[310] * 20])
    for limit in (1, 3):
        assert model._asking().greedy([[1, 300]], model._next_logits(None), limit) == [[310] * limit]
    assert script.num_calls == 4


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


@pytest.mark.parametrize("kind", ["image", "unknown"])
def test_only_text_is_generated(
    kind: str, model: Model, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image placeholder without an image, or an id that the tokenizer does not have, is no answer."""
    token = {"image": tokenizer.image_id, "unknown": tokenizer.vocab_size + 3}[kind]
    real = model.logits

    def tempting(input_ids: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        logits = real(input_ids, images)
        logits[..., token] = 1e9
        return logits

    monkeypatch.setattr(model, "logits", tempting)
    wanted = model.tokenizer.decode([int(real(torch.tensor([[1, 300]]))[0, -1].argmax())])
    (answer,) = model._asking().greedy([[1, 300]], model._next_logits(None), 1)
    assert model.tokenizer.decode(answer) == wanted
