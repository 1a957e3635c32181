"""From a conversation and a question to an answer that grows."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megamm.chat.conversation import Conversation
from megamm.data.image_file import load_image
from megamm.data.templates import Template, Turn
from megamm.errors import InputError, MegammError
from megamm.inference import Decoding, Model
from megamm.inference.asking import evaluation_loader
from megamm.inference.questions import as_questions

_UNFINISHED = "\ufffd"  # what the bytes of a character decode to while some of them are missing


class TooLong(InputError):
    """A conversation leaves no room for an answer."""


class Stopped(Exception):
    """Raised by whoever listens, to end an answer."""


@dataclass(frozen=True)
class Question:
    """A question that can be asked.

    Attributes:
        turns: of the prompt.
        pictures: for its placeholders.
        positions: that the prompt takes.
        room: positions that are left for the answer.
    """

    turns: list[Turn]
    pictures: list[Path]
    positions: int
    room: int


class Answerer:
    """A model that answers one conversation at a time, whoever asks.

    Attributes:
        has_memory: whether the model's template can hold several questions.
        note: what the user should know of a template that is not for conversations; "" if it is.
    """

    def __init__(self, model: Model) -> None:
        """
        Raises:
            InputError: the checkpoint has no tokenizer, or that lacks a token of the template.
        """
        model.asking()  # raises what is wrong before anything is changed
        self.takes_system = model.template.takes == "conversation" and bool(model.template.system)
        self._name = model.template.name
        self.has_memory, self.note = model.template.takes == "conversation", _note(model.template)
        model.template = as_questions(model.template)
        self._model = model
        self._asking = model.asking()
        self._loader = evaluation_loader(model.recipe)
        self._lock = threading.Lock()

    def check_system(self, message: str | None) -> None:
        """Raise InputError if there is a system message and no place for it."""
        if message is not None and not self.takes_system:
            raise InputError(f"template {self._name}: has no place for a system message; leave it out")

    def check_picture(self, picture: Path) -> None:
        """Raise InputError if the model cannot look at a picture."""
        if self._model.recipe.model.assembly == "language":
            raise InputError(f"{picture}: the model is a language model and sees no pictures; leave it out")
        load_image(picture, self._loader)

    def prepare(self, conversation: Conversation, question: str, pictures: Sequence[Path]) -> Question:
        """What is asked.

        Raises:
            InputError: the prompt leaves no room for an answer, or the template wants a picture.
        """
        template = self._model.template
        if "{question}" not in template.question and not pictures:
            raise InputError(f"template {self._name}: captions pictures; give one with the question")
        turns, shown = conversation.asking(question, pictures)
        positions, most = len(self._asking.prompt(turns)), self._asking.max_positions
        if positions >= most:
            remedy = "begin anew or ask for less" if conversation.exchanges else "ask for less"
            raise TooLong(f"the conversation takes {positions} positions, and the model has {most}; {remedy}")
        return Question(turns, shown, positions, most - positions)

    def answer(self, question: Question, decoding: Decoding, listener: Callable[[str], None]) -> str:
        """The whole answer, no longer than there is room.

        Args:
            listener: is told of the answer so far, as often as it has grown; may raise Stopped.
        Raises:
            InputError: a picture cannot be read.
        """
        decoding = replace(decoding, max_new_tokens=min(decoding.max_new_tokens, question.room))

        def tell(_: int, text: str) -> None:
            listener(text.rstrip(_UNFINISHED))

        with self._lock:
            return self._model.generate([question.turns], [question.pictures], None, decoding, tell)[0]

    def stream(
        self, question: Question, decoding: Decoding, stop: threading.Event
    ) -> Generator[str, None, None]:
        """The answer so far, as often as it has grown, and last the whole answer, or as much of it as there
        was when `stop` was set (which closing this iterator does).

        Raises:
            InputError: as `answer`.
        """
        news: queue.Queue[str | BaseException | None] = queue.Queue()

        def listen(text: str) -> None:
            if stop.is_set():
                raise Stopped
            news.put(text)

        def work() -> None:
            try:
                listen("")  # whoever has stopped while others were answered is not answered
                news.put(self.answer(question, decoding, listen))
            except Stopped:
                pass
            except BaseException as error:
                news.put(error)
            news.put(None)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (item := news.get()) is not None:
                if isinstance(item, MegammError):
                    raise item
                if isinstance(item, BaseException):
                    raise RuntimeError("the answer failed") from item
                yield item
        finally:
            stop.set()


def _note(template: Template) -> str:
    name = f"template {template.name}"
    if template.takes == "document":
        return f"{name}: is for documents; what you type is the beginning of one, and goes on by itself"
    if template.takes == "pair":
        return f"{name}: is for one question, so each is asked without those before it" + (
            "" if "{question}" in template.question else "; it captions pictures and does not read the words"
        )
    return ""
