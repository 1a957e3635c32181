"""The conversation in a terminal, and with a script: one question a line, answers on stdout.

For a person there are a prompt, line editing and notes; Ctrl-C stops the answer, Ctrl-D leaves. A script gets
the answers on stdout and nothing else; what went wrong is on stderr and in the exit code.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from megamm.chat.answering import Answerer, Question, Stopped, TooLong
from megamm.chat.commands import COMMANDS, run_command
from megamm.chat.conversation import Conversation
from megamm.errors import InputError
from megamm.inference import Decoding

PROMPT = "> "
_HINT = "Ctrl-D or /quit leaves, /help lists the commands"


class Terminal:
    """One conversation with a person or a script.

    Attributes:
        conversation: so far.
        pending: pictures that are shown with the next question.
    """

    def __init__(
        self,
        answerer: Answerer,
        decoding: Decoding,
        conversation: Conversation,
        pictures: Sequence[Path] = (),
        source: TextIO | None = None,
        out: TextIO | None = None,
    ) -> None:
        """
        Args:
            source: of lines; None: stdin.
            out: of answers; None: stdout.
        """
        self.answerer, self.conversation, self.pending = answerer, conversation, list(pictures)
        self._decoding = decoding
        self._source, self._out = source or sys.stdin, out or sys.stdout
        self.is_person = self._source.isatty() and self._out.isatty()
        self._num_problems = 0

    def run(self, name: str) -> int:
        """Ask until the lines end. Returns the exit code: for a script 2 if a line could not be answered.

        Args:
            name: of the model, for the greeting.
        """
        for stream in (self._source, self._out):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")  # bytes that are no text end no conversation
        if self.answerer.note:
            self.problem(self.answerer.note)
        self.note(f"{name}: ask, or show a picture with /image FILE; {_HINT}")
        if self.is_person:
            _edit_lines()
        for line in self._lines():
            try:
                if not self._take(line):
                    break
            except KeyboardInterrupt:  # between an answer and the next question
                if not self.is_person:
                    raise
                self.note(f"\n{_HINT}")
        return 2 if self._num_problems and not self.is_person else 0

    def note(self, sentence: str) -> None:
        """Say something that a script does not want to know."""
        if self.is_person:
            print(sentence, file=self._out, flush=True)

    def problem(self, sentence: str) -> None:
        """Say what is wrong."""
        print(f"megamm: {sentence}", file=self._out if self.is_person else sys.stderr, flush=True)

    def _lines(self) -> Iterator[str]:
        if not self.is_person:
            yield from self._source
            return
        while True:
            try:
                yield input(PROMPT)
            except EOFError:
                print(file=self._out)
                return
            except KeyboardInterrupt:
                print(f"\n{_HINT}", file=self._out)

    def _take(self, line: str) -> bool:
        """One line of input. Returns whether to go on."""
        line = line.strip().encode("utf-8", "replace").decode()
        if not line:
            return True
        try:
            if line.startswith("/") and not line.startswith("//"):
                return run_command(self, line)
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
        except InputError as error:
            self._num_problems += 1
            self.problem(str(error))
        return True

    def _ask(self, question: str) -> None:
        try:
            asked = self.answerer.prepare(self.conversation, question, self.pending)
        except TooLong as error:
            way = " (/undo, /reset)" if self.conversation.exchanges else ""
            raise InputError(f"{error}{way}") from None
        if asked.room < self._decoding.max_new_tokens:
            self.note(f"({asked.positions} positions are taken, {asked.room} are left; /reset begins anew)")
        answer = self._answer(asked)
        if answer is None:
            return
        self.conversation.add(question, self.pending, answer)
        self.pending = []

    def _answer(self, asked: Question) -> str | None:
        """Write the answer while it grows. Returns as much of it as there was when it was stopped; None if it
        had not begun: the question may then be asked again, with its pictures."""
        said = Growing(self._write)
        try:
            with _stoppable(self.is_person) as check:

                def listen(text: str) -> None:
                    said.show(text)
                    check()

                answer = self.answerer.answer(asked, self._decoding, listen)
        except (Stopped, KeyboardInterrupt):
            if not self.is_person:
                raise
            self._write("\n" if said.shown else "")
            self.note("(stopped)")
            return said.shown or None
        said.show(answer)
        self._write("\n")
        return answer

    def _write(self, text: str) -> None:
        self._out.write(_harmless(text) if self.is_person else text)
        self._out.flush()


class Growing:
    """A text that becomes longer, written piece by piece.

    Attributes:
        shown: what has been written.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self.shown, self._write = "", write

    def show(self, text: str) -> None:
        """Write what is new. Where the text is another one than so far, all of it on a line of its own."""
        if text.startswith(self.shown):
            self._write(text[len(self.shown) :])
        elif self.shown.startswith(text):  # a text that ends the answer was cut off
            return
        else:
            self._write(f"\n{text}")
        self.shown = text


@contextlib.contextmanager
def _stoppable(is_person: bool) -> Iterator[Callable[[], None]]:
    """Gives a function that raises Stopped after Ctrl-C: between two tokens, where the model can be left. A
    second Ctrl-C does not wait for that."""
    if not is_person or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    def check() -> None:
        if pressed:
            raise Stopped

    before = signal.signal(signal.SIGINT, press)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _harmless(text: str) -> str:
    """Without the characters by which a text could command the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _edit_lines() -> None:
    """Line editing, and completion of commands and of files behind /image and /save."""
    try:
        import readline
    except ImportError:  # a Python without it still reads lines
        return
    import glob

    def complete(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()
        if line.startswith(("/image ", "/save ")):
            found = [f"{f}/" if Path(f).is_dir() else f for f in sorted(glob.glob(f"{glob.escape(text)}*"))]
        else:
            found = [f"/{name} " for name in COMMANDS if f"/{name}".startswith(line)] if line else []
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
