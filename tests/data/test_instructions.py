"""The words that a recipe adds to questions and captions."""

from __future__ import annotations

import pytest

from megamm.data import instructions
from megamm.data.conversation import Conversation
from megamm.data.templates import Turn
from megamm.errors import InputError

SHORT = "Answer the question using a single word or phrase."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
LETTER = "Answer with the option's letter from the given choices directly."


def asked(set_name: str, task: str, *questions: str) -> list[str]:
    turns = [turn for question in questions for turn in (Turn("user", question), Turn("assistant", "<a>"))]
    made = Conversation("key", 3, ["x.jpg"], turns, task)
    found = instructions.apply(set_name, made)
    assert found._replace(turns=[]) == made._replace(turns=[])
    assert [turn.text for turn in found.turns[1::2]] == ["<a>"] * len(questions)
    return [turn.text for turn in found.turns[::2]]


@pytest.mark.parametrize(
    "set_name, task, question, wanted",
    [
        ("infimm", "caption", "<image>", "<image>\nPlease describe the image."),
        ("llava", "caption", "<image>", "<image>\nProvide a one-sentence caption for the provided image."),
        ("infimm", "vqa", "<image>\nWhat?", f"<image>\nWhat?\n{SHORT}"),
        ("llava", "vqa", "What?", f"What?\n{SHORT}"),
        ("infimm", "vizwiz", "<image>\nWhat?", f"<image>\n{UNSURE}\nWhat?\n{SHORT}"),
        ("llava", "vizwiz", "<image>\nWhat?", f"<image>\nWhat?\n{UNSURE}\n{SHORT}"),
        ("infimm", "choice", "<image>\nWhat?\nA. x", f"<image>\nWhat?\nA. x\n{LETTER}"),
        ("llava", "choice", "What?\nA. x", f"What?\nA. x\n{LETTER}"),
        ("infimm", "", "<image>\nWhat?", "<image>\nWhat?"),
        ("infimm", "something else", "<image>\nWhat?", "<image>\nWhat?"),
        ("none", "vqa", "<image>\nWhat?", "<image>\nWhat?"),
    ],
)
def test_words(set_name: str, task: str, question: str, wanted: str) -> None:
    assert asked(set_name, task, question) == [wanted]


def test_the_first_question_carries_them() -> None:
    assert asked("llava", "vqa", "<image>\nWho?", "When?") == [f"<image>\nWho?\n{SHORT}", "When?"]


def test_documents_stay() -> None:
    made = Conversation("key", 0, [], [Turn("document", "text")], "vqa")
    assert instructions.apply("infimm", made) == made


def test_there_is_no_such_set() -> None:
    assert instructions.names() == ["infimm", "llava", "none"]
    with pytest.raises(InputError, match="there is no 'alpaca'; choose one of infimm, llava, none"):
        asked("alpaca", "vqa", "What?")
