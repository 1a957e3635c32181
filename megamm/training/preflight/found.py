"""What a check before the first step finds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Found:
    """The findings of one check on one rank, a sentence each.

    Attributes:
        problems: what does not hold, with the remedy; they stop the run unless the recipe says otherwise.
        remarks: what the user should know; they stop nothing.
    """

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
