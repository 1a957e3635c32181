"""What each token of a sample says, as a person can read it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from megamm.pages.text import visible

REPLACEMENT = "\ufffd"
LONGEST = 8  # tokens that one character may take
ANCHOR = "a"


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    vocab_size: int
    image_id: int
    sha256: str
    special_tokens: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids."""


class Piece(NamedTuple):
    """One token.

    Attributes:
        text: what it adds to the text; nothing for the later tokens of a character that takes several.
        kind: "part" is such a later token, "foreign" an id outside the vocabulary.
        label: id and text, for hovering.
    """

    text: str
    kind: Literal["plain", "special", "image", "part", "foreign"]
    label: str


class TokenTexts:
    """Turns ids into readable pieces, with any tokenizer that can decode."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        # Decoders strip a space that begins the text; behind a letter it stays.
        self._anchor = vocabulary.encode(ANCHOR)
        self._anchor_text = vocabulary.decode(self._anchor, skip_special=False)
        self._special = {token: text for text, token in vocabulary.special_tokens.items()}
        self._known: dict[int, str] = {}

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of `ids`, one for each."""
        pieces: list[Piece] = []
        while len(pieces) < len(ids):
            pieces += self._next(ids, len(pieces))
        return pieces

    def _next(self, ids: Sequence[int], start: int) -> list[Piece]:
        token = ids[start]
        if not 0 <= token < self._vocabulary.vocab_size:
            return [Piece(f"[{token}]", "foreign", f"id {token} is outside the vocabulary")]
        if token == self._vocabulary.image_id or token in self._special:
            kind: Literal["image", "special"] = "image" if token == self._vocabulary.image_id else "special"
            text = self._special.get(token, "<image>")
            return [Piece(text, kind, f"id {token} · {text}")]
        text = self._text(token)
        if REPLACEMENT in text:
            for length in range(2, min(LONGEST, len(ids) - start) + 1):
                group = ids[start : start + length]
                if not self._ordinary(group[-1]):
                    break
                whole = self._decoded(group)
                if REPLACEMENT not in whole:
                    return _group(group, whole)
        return [Piece(text, "plain", _label(token, text))]

    def _ordinary(self, token: int) -> bool:
        return 0 <= token < self._vocabulary.vocab_size and token not in self._special

    def _text(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decoded([token])
        return self._known[token]

    def _decoded(self, ids: Sequence[int]) -> str:
        whole = self._vocabulary.decode([*self._anchor, *ids], skip_special=False)
        return whole.removeprefix(self._anchor_text)


def _group(ids: Sequence[int], text: str) -> list[Piece]:
    parts = [
        Piece("", "part", f"id {token} · part {number} of {len(ids)} of {_quoted(text)}")
        for number, token in enumerate(ids, start=1)
    ]
    return [parts[0]._replace(text=text, kind="plain"), *parts[1:]]


def _label(token: int, text: str) -> str:
    return f"id {token} · {_quoted(text)}"


def _quoted(text: str) -> str:
    return json.dumps(visible(text.replace("\n", "\u23ce")), ensure_ascii=False)
