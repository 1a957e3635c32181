"""What was said and shown so far, and the prompt that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megamm.data.templates import Turn
from megamm.inference.questions import with_places, words


@dataclass(frozen=True)
class Exchange:
    """A question, the pictures that were shown with it, and the answer (perhaps cut short)."""

    question: str
    pictures: tuple[Path, ...]
    answer: str


@dataclass
class Conversation:
    """What was said and shown so far.

    Attributes:
        system: message that replaces that of the template; None keeps it.
        has_memory: whether a question is asked together with what was said before it.
    """

    system: str | None = None
    has_memory: bool = True
    exchanges: list[Exchange] = field(default_factory=list)

    def asking(self, question: str, pictures: Sequence[Path]) -> tuple[list[Turn], list[Path]]:
        """The turns of a prompt that ends with `question`, and the pictures for their placeholders."""
        turns = [] if self.system is None else [Turn("system", words(self.system))]
        shown: list[Path] = []
        for earlier in self.exchanges if self.has_memory else []:
            turns.append(Turn("user", with_places(earlier.question, len(earlier.pictures))))
            turns.append(Turn("assistant", words(earlier.answer)))
            shown += earlier.pictures
        turns.append(Turn("user", with_places(question, len(pictures))))
        return turns, [*shown, *pictures]

    def add(self, question: str, pictures: Sequence[Path], answer: str) -> None:
        """Remember an answer."""
        self.exchanges.append(Exchange(question, tuple(pictures), answer))

    def undo(self) -> Exchange | None:
        """Forget the last question and its answer, and return them; None if there is none."""
        return self.exchanges.pop() if self.exchanges else None

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.exchanges.clear()
