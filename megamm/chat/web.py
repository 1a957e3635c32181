"""The conversation in the browser: what happens on the page. page.py has its looks.

Everybody who opens the page has a conversation of their own. Questions wait in a queue, and one at a time is
answered: the model is one.
"""

from __future__ import annotations

import contextlib
import html
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megamm.chat.answering import Answerer
from megamm.chat.conversation import Conversation
from megamm.errors import InputError
from megamm.inference import Decoding

PICTURE_MB = 20  # of one uploaded file
_AT_MOST_EVERY_S = 0.05  # is the page told of a growing answer


@dataclass
class Running:
    """An answer that is being given.

    Attributes:
        stop: set by whoever wants no more of it.
        is_forgotten: whether its conversation was cleared meanwhile.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    is_forgotten: bool = False


class Chat:
    """What the events of the page call. All but `ask` return at once.

    Args:
        decoding: how answers are chosen; the page changes length, temperature and top-p.
    """

    def __init__(self, answerer: Answerer, decoding: Decoding) -> None:
        self.answerer, self._decoding = answerer, decoding
        self._running: dict[str, Running] = {}

    def ask(
        self,
        visitor: str,
        question: str,
        pictures: Sequence[Path],
        conversation: Conversation,
        settings: tuple[float, float, int],
    ) -> Iterator[Conversation]:
        """The conversation with the answer so far, as often as that has grown.

        Args:
            visitor: identifies the page that asks.
            settings: temperature (0: the likeliest), top-p, longest answer.
        Raises:
            InputError: the question cannot be asked.
        """
        for picture in pictures:
            self.answerer.check_picture(picture)
        if conversation.system is not None:
            self.answerer.check_system(conversation.system)
        asked = self.answerer.prepare(conversation, question, pictures)
        running = self._running[visitor] = Running()
        so_far, told = "", 0.0
        stream = self.answerer.stream(asked, _decoding(self._decoding, *settings), running.stop)
        yield _with(conversation, question, pictures, "")
        with contextlib.closing(stream):
            for so_far in stream:
                if time.monotonic() - told > _AT_MOST_EVERY_S:
                    yield _with(conversation, question, pictures, so_far)
                    told = time.monotonic()
        if running.is_forgotten:
            yield Conversation(conversation.system, conversation.has_memory)
        elif so_far:
            yield _with(conversation, question, pictures, so_far)
        else:  # stopped before it began: it may be asked again
            yield conversation

    def stop(self, visitor: str) -> None:
        """End the answer that is being given to a visitor, and keep what there is of it."""
        if visitor in self._running:
            self._running[visitor].stop.set()

    def forget(self, visitor: str) -> None:
        """End the answer that is being given to a visitor, and keep nothing of the conversation."""
        if visitor in self._running:
            self._running[visitor].is_forgotten = True
            self._running.pop(visitor).stop.set()


def _with(conversation: Conversation, question: str, pictures: Sequence[Path], answer: str) -> Conversation:
    longer = replace(conversation, exchanges=list(conversation.exchanges))
    longer.add(question, pictures, answer)
    return longer


def _decoding(decoding: Decoding, temperature: float, top_p: float, longest: int) -> Decoding:
    """With the values of the page. InputError if somebody sends others than it has."""
    return replace(
        decoding,
        max_new_tokens=int(longest),
        sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_p=float(top_p),
    )


def problem(error: BaseException) -> str:
    """What the page shows of an error."""
    unexpected = "the answer failed; the output of the server says why"
    sentence = str(error) if isinstance(error, InputError) else unexpected
    return f'<div role="alert">{html.escape(sentence)}</div>'


def serve(
    answerer: Answerer,
    decoding: Decoding,
    system: str | None,
    pictures: Sequence[Path],
    name: str,
    host: str,
    port: int,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Raises:
        InputError: the address cannot be listened at.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # (before gradio is imported)
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="megamm-chat-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # gone with the server
        from megamm.chat.page import Texts, build, served

        texts = Texts(name, answerer.note, system if answerer.takes_system else None, answerer.takes_system)
        page = build(Chat(answerer, decoding), texts, decoding, pictures, Path(uploads))
        with served(page, host, port, PICTURE_MB) as address:
            print(f"{name} answers at {address} (Ctrl-C ends)", flush=True)
            ended = threading.Event()
            signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
            with contextlib.suppress(KeyboardInterrupt):
                ended.wait()
