"""The commands of a conversation in the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megamm.chat.saving import save
from megamm.errors import InputError

if TYPE_CHECKING:
    from megamm.chat.terminal import Terminal


def run_command(terminal: Terminal, line: str) -> bool:
    """Run a line that begins with "/". Returns whether the conversation goes on.

    Raises:
        InputError: there is no such command, or it cannot do what it is told.
    """
    name, _, rest = line[1:].partition(" ")
    if name in ("quit", "exit"):
        return False
    if name not in COMMANDS:
        raise InputError(f"/{name}: is no command; /help lists them, and // begins a question with a /")
    COMMANDS[name][1](terminal, rest.strip())
    return True


def _image(terminal: Terminal, rest: str) -> None:
    path = _path(rest, "/image cat.jpg")
    terminal.answerer.check_picture(path)
    terminal.pending.append(path)
    terminal.note(f"{path.name}: shown with the next question ({len(terminal.pending)} picture(s))")


def _reset(terminal: Terminal, rest: str) -> None:
    terminal.conversation.reset()
    terminal.pending = []
    terminal.note("the conversation begins anew")


def _undo(terminal: Terminal, rest: str) -> None:
    if terminal.pending:
        terminal.note(f"{terminal.pending.pop().name}: is not shown")
        return
    last = terminal.conversation.undo()
    terminal.note(f"forgotten: {last.question}" if last else "there is nothing to forget")


def _system(terminal: Terminal, rest: str) -> None:
    message = rest or None
    terminal.answerer.check_system(message)
    terminal.conversation.system = message
    terminal.note("system message: " + (message or "that of the template"))


def _save(terminal: Terminal, rest: str) -> None:
    path = _path(rest, "/save chat.json")
    if not terminal.conversation.exchanges:
        raise InputError("/save: nothing was said yet; ask something first")
    try:
        save(terminal.conversation, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
    terminal.note(f"{path}: holds {len(terminal.conversation.exchanges)} question(s) with their answers")


def _help(terminal: Terminal, rest: str) -> None:
    for name, (usage, _) in COMMANDS.items():
        terminal.note(f"  /{name:<8} {usage}")
    terminal.note("  /quit     end (also Ctrl-D)")
    terminal.note("Ctrl-C stops an answer.")


def _path(text: str, example: str) -> Path:
    """The file that is meant, also as a terminal writes one that was dropped on it (quoted)."""
    if not text:
        raise InputError(f"{example.split()[0]}: names no file; write for example {example}")
    path = Path(text).expanduser()
    if not path.exists():
        try:
            parts = shlex.split(text)
        except ValueError:  # a quotation mark that is no such
            parts = []
        if len(parts) == 1:
            path = Path(parts[0]).expanduser()
    return path


COMMANDS: dict[str, tuple[str, Callable[[Terminal, str], None]]] = {
    "image": ("FILE   show a picture with the next question", _image),
    "undo": ("forget the last question and its answer (or the last picture of the next question)", _undo),
    "reset": ("begin anew, with the same system message", _reset),
    "system": ("TEXT   change the system message; without TEXT: that of the template", _system),
    "save": ("FILE   write the conversation, as LLaVA JSON (FILE.json) or as text", _save),
    "help": ("this list", _help),
}
