"""Foreign text on a page: it stays text, and all of it can be seen."""

from __future__ import annotations

import unicodedata
from html import escape


def visible(text: str) -> str:
    """The text with everything that one cannot see, or that would rearrange what one sees, spelled out."""
    return "".join(_spelled(character) for character in text)


def _spelled(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥\t"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"[U+{ord(character):04X}]"
    return character


def escaped(text: str, soft: bool = False) -> str:
    """Escaped for text and attributes; what cannot be seen is spelled out. `soft` keeps line breaks."""
    seen = visible(text)
    return escape(seen if soft else seen.replace("⏎\n", "⏎"))
