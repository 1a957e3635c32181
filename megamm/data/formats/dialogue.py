"""What readers of conversations share: turns that alternate, and as many images as placeholders."""

from __future__ import annotations

from megamm.data.templates import Turn


def trimmed(turns: list[Turn]) -> list[Turn]:
    """Without an answer that nobody asked for at the start, and a question that nobody answers at the end:
    both teach nothing."""
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    if turns and turns[-1].role == "user":
        turns = turns[:-1]
    return turns


def alternates(turns: list[Turn]) -> bool:
    """Whether the turns are question, answer, ..., question, answer."""
    return len(turns) % 2 == 0 and all(
        turn.role == ("user", "assistant")[number % 2] for number, turn in enumerate(turns)
    )
