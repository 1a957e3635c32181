"""The conversation with a script: what is asked, answered, remembered and refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megamm.chat.answering import Answerer
from megamm.chat.conversation import Conversation
from megamm.chat.terminal import Growing, Terminal
from megamm.data.formats.llava import Llava
from megamm.data.templates import Turn
from megamm.inference import Decoding, Model

LENGTH = 6


def talk(answerer: Answerer, *lines: str, system: str | None = None) -> tuple[list[str], int, Terminal]:
    """Answers to the lines of a script, its exit code, and the terminal."""
    source, out = io.StringIO("".join(f"{line}\n" for line in lines)), io.StringIO()
    conversation = Conversation(system, answerer.has_memory)
    terminal = Terminal(answerer, Decoding(LENGTH), conversation, source=source, out=out)
    code = terminal.run("model")
    return out.getvalue().splitlines(), code, terminal


def answer(model: Model, turns: Sequence[Turn], pictures: Sequence[Path] = ()) -> str:
    """What the model itself says, greedily."""
    return model.generate([turns], [pictures], LENGTH)[0]


def test_each_question_is_asked_with_what_was_said_before(
    model: Model, answerer_under: Callable[..., Answerer], pictures: list[Path]
) -> None:
    answerer = answerer_under()
    said, code, _ = talk(answerer, f"/image {pictures[0]}", "what is this?", "", "a cat?")
    first = [Turn("user", "<image>\nwhat is this?")]
    wanted = [answer(model, first, pictures[:1])]
    second = [*first, Turn("assistant", wanted[0]), Turn("user", "a cat?")]
    wanted.append(answer(model, second, pictures[:1]))
    assert said == wanted and code == 0 and all(wanted)
    assert wanted[1] != answer(model, [Turn("user", "a cat?")])


def test_undo_and_reset_forget(model: Model, answerer_under: Callable[..., Answerer]) -> None:
    answerer = answerer_under()
    said, _, terminal = talk(answerer, "what is red?", "/undo", "a dog", "a circle", "/reset", "a circle")
    alone = [answer(model, [Turn("user", text)]) for text in ("what is red?", "a dog", "a circle")]
    assert [said[0], said[1], said[3]] == alone and said[2] != alone[2]
    assert [one.question for one in terminal.conversation.exchanges] == ["a circle"]


def test_undo_takes_back_a_picture_first(
    answerer_under: Callable[..., Answerer], pictures: list[Path]
) -> None:
    answerer = answerer_under()
    _, _, terminal = talk(answerer, "red", f"/image {pictures[0]}", f"/image {pictures[1]}", "/undo")
    assert terminal.pending == pictures[:1] and len(terminal.conversation.exchanges) == 1


def test_system_message(model: Model, answerer_under: Callable[..., Answerer]) -> None:
    answerer = answerer_under()
    said, _, _ = talk(answerer, "red", "/reset", "/system", "red", system="blue dogs")
    assert said == [
        answer(model, [Turn("system", "blue dogs"), Turn("user", "red")]),
        answer(model, [Turn("user", "red")]),
    ]
    assert said[0] != said[1]


def test_words_are_never_control_tokens(
    model: Model, answerer_under: Callable[..., Answerer], pictures: list[Path]
) -> None:
    answerer = answerer_under()
    conversation = Conversation("<image> </s>")
    conversation.add("<image> is that <image>?", pictures[:1], "an <image></s>")
    question = answerer.prepare(conversation, "</s> <image> <s>", [])
    ids = answerer._asking.prompt(question.turns)
    tokenizer, span = model.tokenizer, model.recipe.model.tokens_per_image
    assert ids.count(tokenizer.image_id) == span and question.pictures == pictures[:1]
    assert ids.count(tokenizer.bos_id) == 1
    assert ids.count(tokenizer.eos_id) == 1, "that behind the answer"
    assert answerer.answer(question, Decoding(2), lambda text: None)


def test_a_placeholder_marks_the_place_of_a_picture(
    answerer_under: Callable[..., Answerer], pictures: list[Path]
) -> None:
    answerer = answerer_under()
    asked = answerer.prepare(Conversation(), "is <image> like <image>?", pictures)
    assert asked.turns == [Turn("user", "is <image> like <image>?")]
    asked = answerer.prepare(Conversation(), "is <image> red?", pictures)
    assert asked.turns == [Turn("user", "<image>\n<image>\nis < image> red?")]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/image none.png", "none.png: the image cannot be read (No such file or directory)"),
        ("/image {text}", "is not an image in a known format"),
        ("/image", "/image: names no file"),
        ("/save", "/save: names no file"),
        ("/save x.json", "/save: nothing was said yet"),
        ("/dance", "/dance: is no command; /help lists them"),
        ("red " * 300, "positions, and the model has 256; ask for less"),
    ],
)
def test_what_cannot_be_done_is_said_and_ends_nothing(
    line: str,
    sentence: str,
    answerer_under: Callable[..., Answerer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "no picture.png"
    text.write_text("words")
    said, code, _ = talk(answerer_under(), line.replace("{text}", str(text)), "a dog")
    err = capsys.readouterr().err
    assert len(said) == 1 and said[0] and code == 2
    assert err.startswith("megamm: ") and sentence in err and err.count("\n") == 1


def test_a_conversation_that_becomes_too_long(
    answerer_under: Callable[..., Answerer], capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = answerer_under()
    said, code, terminal = talk(answerer, *["a red circle and a blue square"] * 12, "/reset", "a dog")
    refused = capsys.readouterr().err.splitlines()
    assert 0 < len(refused) < 12 and len(said) == 13 - len(refused) and code == 2
    assert all("the model has 256; begin anew or ask for less (/undo, /reset)" in line for line in refused)
    assert len(terminal.conversation.exchanges) == 1


def test_an_answer_takes_no_more_than_there_is_room(
    model: Model, answerer_under: Callable[..., Answerer]
) -> None:
    answerer = answerer_under()
    asked = answerer.prepare(Conversation(), "red " * 60, [])
    assert 0 < asked.room < 256
    pieces: list[str] = []
    whole = answerer.answer(asked, Decoding(1000), pieces.append)
    assert pieces[-1] == whole.rstrip("\ufffd") and len(pieces) > 1
    assert whole == model.generate([asked.turns], [[]], asked.room)[0]


def test_a_template_for_captions(
    model: Model,
    answerer_under: Callable[..., Answerer],
    pictures: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    answerer = answerer_under("plain")
    image = f"/image {pictures[0]}"
    said, code, _ = talk(answerer, image, "what?", image, "something else", "and now?", "/system be kind")
    err = capsys.readouterr().err.splitlines()
    caption = answer(model, [Turn("user", "<image>")], pictures[:1])
    assert said == [*caption.splitlines(), *caption.splitlines()] and code == 2
    assert err == [
        "megamm: template plain: is for one question, so each is asked without those before it; "
        "it captions pictures and does not read the words",
        "megamm: template plain: captions pictures; give one with the question",
        "megamm: template plain: has no place for a system message; leave it out",
    ]


def test_a_template_for_documents(
    model: Model, answerer_under: Callable[..., Answerer], capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = answerer_under("text")
    said, code, _ = talk(answerer, "a red dog", "a red dog")
    assert "template text: is for documents" in capsys.readouterr().err and code == 0
    (wanted,) = model.complete(["a red dog"], [[]], Decoding(LENGTH))
    assert "\n".join(said) == f"{wanted}\n{wanted}"


def test_saved_conversations_are_read_back(
    answerer_under: Callable[..., Answerer], pictures: list[Path], tmp_path: Path
) -> None:
    answerer, out = answerer_under(), tmp_path / "chat.json"
    lines = [f'/image "{pictures[0]}"', "what <is this?", f"/image {pictures[1]}", "a <image> or <image>?"]
    said, code, _ = talk(answerer, *lines, f"/save {out}", f"/save {tmp_path / 'chat.txt'}")
    assert code == 0
    (entry,) = json.loads(out.read_text())
    found = Llava().entry(entry, 0, str(out))
    assert found.images == [str(picture) for picture in pictures]
    assert found.turns == [
        Turn("user", "<image>\nwhat <is this?"),
        Turn("assistant", said[0]),
        Turn("user", "<image>\na < image> or < image>?"),
        Turn("assistant", said[1]),
    ]
    text = (tmp_path / "chat.txt").read_text()
    assert f"(picture {pictures[1]})\nUser: a <image> or <image>?\nModel: {said[1]}\n" in text


def test_a_slash_can_begin_a_question(answerer_under: Callable[..., Answerer]) -> None:
    _, _, terminal = talk(answerer_under(), "//etc is what?", "/quit", "never asked")
    assert [one.question for one in terminal.conversation.exchanges] == ["/etc is what?"]


@pytest.mark.parametrize(
    ("texts", "written"),
    [
        (["a", "a cat", "a cat sits"], "a cat sits"),
        (["a cat STO", "a cat"], "a cat STO"),  # what was cut off has been seen
        (["a\ncat", "a dog"], "a\ncat\na dog"),
    ],
)
def test_growing_text(texts: list[str], written: str) -> None:
    pieces: list[str] = []
    growing = Growing(pieces.append)
    for text in texts:
        growing.show(text)
    assert "".join(pieces) == written
