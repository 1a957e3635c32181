"""`megamm chat` as a process: with a script, and with a person at a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from megamm.cli import entry as cli
from megamm.data.templates import Turn
from megamm.engine import groups
from megamm.inference import load
from tests.inference.conftest import checkpoints, pictures

__all__ = ["checkpoints", "pictures"]

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
PATIENCE_S = 90.0
SYSTEM = "be brief"
# the command, with a model that takes its time
SLOW = """
import sys, time
from megamm.chat import terminal
show = terminal.Growing.show
terminal.Growing.show = lambda self, text: (time.sleep(0.1), show(self, text))[1]
from megamm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def options(checkpoint: Path, length: int) -> list[str]:
    return ["chat", "--checkpoint", str(checkpoint), "--system", SYSTEM, "--max-new-tokens", str(length)]


def greedy(checkpoint: Path, question: str, pictures: list[Path], length: int) -> str:
    model = load(checkpoint, "cpu")
    (answer,) = model.generate([[Turn("system", SYSTEM), Turn("user", question)]], [pictures], length)
    groups.shutdown()
    return answer


def test_a_script_gets_answers_on_stdout(checkpoints: dict[str, Path], pictures: list[Path]) -> None:
    command = [sys.executable, "-m", "megamm", *options(checkpoints["merged"], 8)]
    script = b"what is \xff this?\n/image none.png\n/reset\nred\n".decode("latin-1")
    done = subprocess.run(
        [*command, "--image", str(pictures[0])],
        input=script.encode("latin-1"),
        capture_output=True,
        env=ENV,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    wanted = [
        greedy(checkpoints["merged"], "<image>\nwhat is \ufffd this?", pictures[:1], 8),
        greedy(checkpoints["merged"], "red", [], 8),
    ]
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in wanted)
    err = done.stderr.decode()
    assert err.count("\n") == 1 and err.startswith("megamm: none.png: "), err
    assert done.returncode == 2


def wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said about wrong usage."""
    assert cli.main(["chat", "--checkpoint", "none", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megamm: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "--web: gradio is not installed; install it: pip install 'gradio>=6,<7'"),
        ("3.18.0", "--web: gradio 3.18.0 is installed, and the page needs 6; pip install 'gradio>=6,<7'"),
    ],
)
def test_gradio_has_to_be_there(
    found: str | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    assert sentence in wrong(["--web"], capsys)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "none.png"], "none.png: no such file; give a picture"),
        (["--top-p", "1.5"], "top_p: 1.5; use a number above 0, at most 1"),
        (["--temperature", "-1"], "temperature: -1.0; use a number above 0"),
        ([], "none"),
    ],
)
def test_wrong_usage(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in wrong(arguments, capsys)


def test_several_processes_cannot_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "WORLD_SIZE: a chat runs in one process" in wrong([], capsys)


class Person:
    """Someone at a terminal."""

    def __init__(self, command: list[str]) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=ENV, cwd=ROOT, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(other)
        self.seen = ""

    def type(self, text: str) -> None:
        """Press keys. What is on the screen so far is forgotten."""
        self.seen = ""
        os.write(self._end, text.encode())

    def wait_for(self, text: str) -> str:
        """What is on the screen as soon as `text` is among it."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} does not come: {self.seen!r}"
            if select.select([self._end], [], [], 1)[0]:
                try:
                    self.seen += os.read(self._end, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # the process has ended
                    break
        assert text in self.seen, self.seen
        return self.seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def person(checkpoints: dict[str, Path]) -> Iterator[Person]:
    someone = Person([sys.executable, "-c", SLOW, *options(checkpoints["merged"], 100)])
    yield someone
    someone.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(
    person: Person, checkpoints: dict[str, Path], pictures: list[Path], tmp_path: Path
) -> None:
    question, out = "what is red?", tmp_path / "chat.json"
    wanted = greedy(checkpoints["merged"], f"<image>\n{question}", pictures[:1], 100)
    assert len(wanted) > 60
    assert "/image FILE" in person.wait_for("> ")
    person.type(f"/image {pictures[0]}\n")
    person.wait_for("0.png: shown with the next question (1 picture(s))\n> ")
    person.type(f"{question}\n")
    person.wait_for(f"\n{wanted[:10]}")  # the echo of the question is before it
    person.type("\x03")
    person.wait_for("(stopped)\n> ")
    person.type(f"/save {out}\n")
    person.wait_for("holds 1 question(s)")
    person.wait_for("> ")
    (entry,) = json.loads(out.read_text())
    heard = entry["conversations"][1]["value"]
    assert wanted.startswith(heard) and 10 <= len(heard) < len(wanted)
    person.type("half a question\x03")
    person.wait_for("Ctrl-D or /quit leaves, /help lists the commands\n> ")
    person.type("\x04")
    assert person.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in person.seen
