"""Text to token ids and back: a SentencePiece model plus added tokens such as `<image>`.

The one rule of encoding, equal to Hugging Face's LlamaTokenizer with `legacy=False`: the text is cut
at every added or control token (`<image>`, `<s>`, `</s>`, `<unk>`); each of those becomes its id and
every stretch between them is encoded by SentencePiece on its own, spaces kept. The word-start marker
(SentencePiece's dummy prefix) is put in front of the whole text only: not after an added token, and
not where the text already begins with a space.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megamm.errors import InputError

IMAGE_TOKEN = "<image>"
MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.megamm.json"
CONFIG_VERSION = 1
SPACE = "\u2581"  # how SentencePiece writes a space inside pieces

# Serialized `normalizer_spec {add_dummy_prefix: false, remove_extra_whitespaces: false}`. Protocol buffers
# merge repeated messages, so appending these bytes to a model switches both off; the prefix is ours to place.
_KEEP_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class Tokenizer:
    """A SentencePiece model with added tokens; see the module docstring for the rule of encoding.

    Attributes:
        vocab_size: number of ids, added tokens included.
        bos_id, eos_id, unk_id: of the SentencePiece model.
        pad_id: the model's padding piece, or its unknown piece where it has none (as LLaVA does).
        image_id: of the placeholder that stands for one image.
        added_tokens: text -> id of the tokens that are no pieces of the model.
        sha256: identifies the tokenizer: model bytes and added tokens.
    """

    def __init__(self, model: bytes, added_tokens: dict[str, int] | None = None, origin: str = "tokenizer"):
        self.model = model
        self._pieces = _load_pieces(model, origin)
        self.num_pieces = self._pieces.get_piece_size()
        self.added_tokens = _check_added(added_tokens, self._pieces, origin)
        self.vocab_size = self.num_pieces + sum(i >= self.num_pieces for i in self.added_tokens.values())
        self.bos_id, self.eos_id, self.unk_id = (
            self._pieces.bos_id(),
            self._pieces.eos_id(),
            self._pieces.unk_id(),
        )
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise InputError(
                f"{origin}: has no <s>, </s> or <unk> piece; use a LLaMA style SentencePiece model"
            )
        pad_id = self._pieces.pad_id()
        self.pad_id = pad_id if pad_id >= 0 else self.unk_id
        controls = [i for i in range(self.num_pieces) if self._pieces.is_control(i) or i == self.unk_id]
        self.special_tokens = {self._pieces.id_to_piece(i): i for i in controls} | self.added_tokens
        self.image_id = self.special_tokens.get(IMAGE_TOKEN, self._pieces.piece_to_id(IMAGE_TOKEN))
        self._special_ids = frozenset(self.special_tokens.values())
        self._special_texts = {i: text for text, i in self.special_tokens.items()}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._split = re.compile("|".join(re.escape(text) for text in longest_first))
        self.sha256 = _identity(model, self.added_tokens)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a directory (tokenizer.model, optionally tokenizer_config.megamm.json) or a
        bare SentencePiece .model file.

        Raises:
            InputError: missing or damaged files, contradictory added tokens.
        """
        path = Path(path)
        model_path = path / MODEL_FILE if path.is_dir() else path
        try:
            model = model_path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{model_path}: cannot read the tokenizer ({error.strerror}); give a tokenizer directory "
                "or a SentencePiece .model file"
            ) from None
        config = path / CONFIG_FILE
        added = _read_config(config) if path.is_dir() and config.exists() else None
        return cls(model, added, origin=str(model_path))

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.model and tokenizer_config.megamm.json into `directory` (made if missing)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL_FILE).write_bytes(self.model)
        config = {"format": CONFIG_VERSION, "added_tokens": self.added_tokens}
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode(self, text: str, bos: bool = False, prefix: bool = True) -> list[int]:
        """Token ids of `text`, in which added and control tokens count as such.

        Args:
            bos: put the id of `<s>` in front.
            prefix: `text` starts the whole text; False for a continuation, which gets no word-start marker.
        """
        ids = [self.bos_id] if bos else []
        start = 0
        for match in self._split.finditer(text):
            ids += self._encode_stretch(text[start : match.start()], prefix and start == 0)
            ids.append(self.special_tokens[match.group()])
            start = match.end()
        return ids + self._encode_stretch(text[start:], prefix and start == 0)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; `skip_special` leaves out added and control tokens.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        parts: list[str] = []
        stretch: list[int] = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            if token not in self._special_ids:
                stretch.append(int(token))
            elif not skip_special:
                parts += [self._pieces.decode(stretch), self._special_texts[token]]
                stretch = []
        text = "".join([*parts, self._pieces.decode(stretch)])
        return text.removeprefix(" ")

    def _encode_stretch(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        if first and not text.startswith((" ", SPACE)):
            text = " " + text
        return self._pieces.encode(text)


def train_tokenizer(texts: Iterable[str], out_dir: str | Path, vocab_size: int) -> Tokenizer:
    """Train a LLaMA style tokenizer (BPE, byte fallback, digits split, no normalisation) and save it.

    Args:
        texts: training texts; added and control tokens in them are left out. Newlines separate pieces,
            as in LLaMA, where a newline is always the byte piece `<0x0A>`.
        vocab_size: ids in total, `<image>` included (the model itself gets one piece less).

    Raises:
        InputError: a vocabulary that is too small for the 259 fixed pieces and the characters of the
            texts, or larger than the texts can fill.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size - 1,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.99995,
            max_sentence_length=1 << 20,
            shuffle_input_sentence=False,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"vocab_size: a tokenizer of {vocab_size} ids cannot be trained on these texts "
            f"({_reason(error)}); choose another vocab_size or give more text"
        ) from None
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(out_dir)
    return tokenizer


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    special = re.compile(f"\n|{IMAGE_TOKEN}|<s>|</s>|<unk>")
    for text in texts:
        yield from (line for line in special.split(text) if line.strip())


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].split("] ")[-1] if str(error).strip() else "no text"


def _load_pieces(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model + _KEEP_SPACES)
        if pieces.get_piece_size() > 0:
            return pieces
    except (RuntimeError, ValueError, OSError, MemoryError):
        pass
    raise InputError(f"{origin}: is not a SentencePiece model; copy the file again or give another one")


def _check_added(
    added: dict[str, int] | None, pieces: sentencepiece.SentencePieceProcessor, origin: str
) -> dict[str, int]:
    """The added tokens; `<image>` gets the next free id unless the model or `added` has it."""
    size = pieces.get_piece_size()
    if added is None:
        known = pieces.id_to_piece(pieces.piece_to_id(IMAGE_TOKEN)) == IMAGE_TOKEN
        return {} if known else {IMAGE_TOKEN: size}
    if sorted(added.values()) != list(range(size, size + len(added))):
        raise InputError(
            f"{origin}: the added tokens must have the ids from {size} on, without gaps; "
            f"correct {CONFIG_FILE} beside it"
        )
    if IMAGE_TOKEN not in added and pieces.id_to_piece(pieces.piece_to_id(IMAGE_TOKEN)) != IMAGE_TOKEN:
        raise InputError(f"{origin}: {IMAGE_TOKEN} is missing; add it to {CONFIG_FILE} beside it")
    return dict(sorted(added.items(), key=lambda item: item[1]))


def _read_config(path: Path) -> dict[str, int]:
    problem = InputError(f"{path}: is not a megamm tokenizer description; copy it again or remove it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise problem from None
    if not isinstance(config, dict) or config.get("format") != CONFIG_VERSION:
        raise problem
    added = config.get("added_tokens")
    if isinstance(added, dict) and all(text and type(i) is int for text, i in added.items()):
        return added
    raise problem


def _identity(model: bytes, added: dict[str, int]) -> str:
    digest = hashlib.sha256(model)
    digest.update(json.dumps(added, sort_keys=True).encode())
    return digest.hexdigest()
