"""What every source format is read into."""

from __future__ import annotations

from typing import NamedTuple

from megamm.data.templates import Turn


class Conversation(NamedTuple):
    """One entry of a source: as many `<image>` placeholders in the questions as there are images.

    Attributes:
        key: the entry's own id, for reports.
        position: of the entry in its file, from 0.
        images: names of the images, in the order of their placeholders.
        turns: question, answer, question, answer, ...
    """

    key: str
    position: int
    images: list[str]
    turns: list[Turn]
