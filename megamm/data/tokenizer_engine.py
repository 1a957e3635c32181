"""What a tokenizer needs from the library behind it, and the SentencePiece library.

An engine encodes stretches of plain text: `Tokenizer` has cut out the control tokens before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import sentencepiece

from megamm.errors import InputError

IMAGE_TOKEN = "<image>"
CONFIG_FILE = "tokenizer_config.megamm.json"
SPACE = "\u2581"  # how SentencePiece writes a space inside pieces

# Where a stretch of text begins: at the start of the whole text, behind a control token, or in the middle of
# running text that is encoded in pieces.
Place = Literal["start", "behind_control", "middle"]

# Serialized `normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}`. Protocol buffers
# merge repeated messages, so appending these bytes to a model switches both off; the prefix is ours to place.
_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class Engine(Protocol):
    """A tokenizer library with one vocabulary.

    Attributes:
        model: contents of the file that defines the vocabulary, added tokens included if it names them.
        num_pieces: ids of the vocabulary proper.
        vocab_size: ids in all.
        added_tokens: text -> id of the tokens that are no pieces of the vocabulary.
        special_tokens: text -> id of the tokens that are cut out of a text: added and control tokens.
        bos_id, unk_id: None where the vocabulary has no such token.
        eos_id, pad_id: of the tokens that end a text and fill a row.
    """

    model: bytes
    num_pieces: int
    vocab_size: int
    added_tokens: dict[str, int]
    special_tokens: dict[str, int]
    bos_id: int | None
    unk_id: int | None
    eos_id: int
    pad_id: int

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written so, if there is one."""
        ...

    def tokens(self) -> dict[int, str]:
        """Id -> how it is written, of every token."""
        ...

    def encode(self, text: str, place: Place) -> list[int]:
        """Ids of plain text."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of ids of the vocabulary."""
        ...


class SentencePieceEngine:
    """A SentencePiece model with added tokens behind its pieces."""

    def __init__(self, model: bytes, added_tokens: Mapping[str, int] | None, origin: str) -> None:
        self.model = model
        self._pieces = _load_pieces(model, origin)
        self.num_pieces = self._pieces.get_piece_size()
        self.added_tokens = self._check_added(added_tokens, origin)
        self.vocab_size = self.num_pieces + len(self.added_tokens)
        bos_id, eos_id, unk_id = self._pieces.bos_id(), self._pieces.eos_id(), self._pieces.unk_id()
        if min(bos_id, eos_id, unk_id) < 0:
            raise InputError(
                f"{origin}: has no <s>, </s> or <unk> piece; use a LLaMA style SentencePiece model"
            )
        self.bos_id: int | None = bos_id
        self.unk_id: int | None = unk_id
        self.eos_id: int = eos_id
        pad_id = self._pieces.pad_id()
        self.pad_id: int = pad_id if pad_id >= 0 else unk_id
        controls = [i for i in range(self.num_pieces) if self._pieces.is_control(i) or i == unk_id]
        self.special_tokens = {self._pieces.id_to_piece(i): i for i in controls} | self.added_tokens
        self._texts = {i: text for text, i in self.special_tokens.items()}

    def token_id(self, text: str) -> int | None:
        """Id of an added token or a piece."""
        if text in self.special_tokens:
            return self.special_tokens[text]
        return _piece_id(self._pieces, text)

    def tokens(self) -> dict[int, str]:
        """Id -> how it is written, of every piece and added token."""
        pieces = self._pieces.id_to_piece(list(range(self.num_pieces)))
        return dict(enumerate(pieces)) | {i: text for text, i in self.added_tokens.items()}

    def encode(self, text: str, place: Place) -> list[int]:
        """Ids; the word-start marker stands at the start of the whole text, unless a space does."""
        if place == "start" and not text.startswith((" ", SPACE)):
            text = " " + text
        ids: list[int] = self._pieces.encode(text)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text, without the space that the word-start marker stands for."""
        parts: list[str] = []
        stretch: list[int] = []
        for token in ids:
            if token not in self._texts:
                stretch.append(int(token))
            elif not skip_special:
                parts += [self._pieces.decode(stretch), self._texts[token]]
                stretch = []
        return "".join([*parts, self._pieces.decode(stretch)]).removeprefix(" ")

    def _check_added(self, added: Mapping[str, int] | None, origin: str) -> dict[str, int]:
        """The added tokens; `<image>` gets the next free id where none are told and no piece is it."""
        size = self.num_pieces
        if added is None:
            return {} if self._has_image() else {IMAGE_TOKEN: size}
        if sorted(added.values()) != list(range(size, size + len(added))):
            raise InputError(
                f"{origin}: the added tokens must have the ids from {size} on, without gaps; "
                f"correct {CONFIG_FILE} beside it"
            )
        if IMAGE_TOKEN not in added and not self._has_image():
            raise InputError(f"{origin}: {IMAGE_TOKEN} is missing; add it to {CONFIG_FILE} beside it")
        return dict(sorted(added.items(), key=lambda item: item[1]))

    def _has_image(self) -> bool:
        return _piece_id(self._pieces, IMAGE_TOKEN) is not None


def extended(
    model: bytes, added: Mapping[str, int] | None, new: Iterable[str], origin: str
) -> dict[str, int]:
    """The added tokens of a SentencePiece model with `new` ones and, last, `<image>` if it is missing.

    Raises:
        InputError: a new token is one already.
    """
    pieces = _load_pieces(model, origin)
    found = dict(added or {})
    for text in new:
        if text in found or _piece_id(pieces, text) is not None:
            raise InputError(f"--add-token: {text!r} is a token of {origin} already; leave it out")
        found[text] = pieces.get_piece_size() + len(found)
    if IMAGE_TOKEN not in found and _piece_id(pieces, IMAGE_TOKEN) is None:
        found[IMAGE_TOKEN] = pieces.get_piece_size() + len(found)
    return found


def _piece_id(pieces: sentencepiece.SentencePieceProcessor, text: str) -> int | None:
    """Id of the piece that is written so; the library gives any other text the unknown id, or -1."""
    found: int = pieces.piece_to_id(text)
    return found if found >= 0 and pieces.id_to_piece(found) == text else None


def _load_pieces(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model + _KEEP_SPACES)
        pieces.id_to_piece(list(range(pieces.get_piece_size())))  # every piece is text
        if pieces.get_piece_size() > 0:
            return pieces
    except (RuntimeError, ValueError, OSError, MemoryError):
        pass
    raise InputError(f"{origin}: is not a SentencePiece model; copy the file again or give another one")
