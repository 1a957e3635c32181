"""Text to token ids and back: a vocabulary plus added tokens such as `<image>`.

Two kinds of files are read: a SentencePiece model (tokenizer.model) and a BPE of Hugging Face's tokenizers
(tokenizer.json). The one rule of encoding is the same for both: the text is cut at every added or control
token (`<image>`, `<s>`, `</s>`, `<unk>`); each of those becomes its id and every stretch between them is
encoded by the library on its own, spaces kept. With SentencePiece this equals Hugging Face's
LlamaTokenizer with `legacy=False`: the word-start marker (SentencePiece's dummy prefix) is put in front of
the whole text only, not after an added token, and not where the text already begins with a space. With
tokenizer.json it stands where that file puts it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import sentencepiece

from megamm.data import tokenizer_engine
from megamm.data.tokenizer_engine import CONFIG_FILE, IMAGE_TOKEN, SPACE, Engine, Place, SentencePieceEngine
from megamm.data.tokenizer_huggingface import COMPANION_FILES, HuggingFaceEngine, with_added
from megamm.errors import InputError
from megamm.whole_files import read_whole

__all__ = ["CONFIG_FILE", "HF_FILE", "IMAGE_TOKEN", "MODEL_FILE", "SPACE", "Tokenizer", "train_tokenizer"]

MODEL_FILE = "tokenizer.model"
HF_FILE = "tokenizer.json"
CONFIG_VERSION = 1


class Tokenizer:
    """A vocabulary with added tokens; see the module docstring for the rule of encoding. It can be pickled.

    Attributes:
        model: contents of the SentencePiece .model or of tokenizer.json.
        num_pieces: number of ids without added tokens.
        vocab_size: number of ids, added tokens included.
        bos_id, unk_id: of the tokens that begin a text and stand for what is unknown; None where there is
            none (a byte-level BPE knows everything, and Qwen's begins no text).
        eos_id: of the token that ends a text.
        pad_id: the padding token, or where there is none the unknown one (as LLaVA does), or the end.
        image_id: of the placeholder that stands for one image.
        added_tokens: text -> id of the tokens that are no pieces of the vocabulary.
        special_tokens: text -> id of all tokens at which a text is cut.
        sha256: identifies the tokenizer: model bytes, added tokens and the roles of control tokens.
    """

    def __init__(
        self,
        model: bytes,
        added_tokens: Mapping[str, int] | None = None,
        origin: str = "tokenizer",
        companions: Mapping[str, bytes] | None = None,
    ) -> None:
        """
        Args:
            model: contents of a SentencePiece .model or of a tokenizer.json.
            added_tokens: of a SentencePiece model (tokenizer.json names them itself); None means `<image>`,
                if it is no piece.
            origin: for error messages.
            companions: of a tokenizer.json, the contents of the files beside it.
        """
        engine: Engine
        if is_json(model):
            model = with_added(model, (), origin)
            engine = HuggingFaceEngine(model, companions or {}, origin)
            if added_tokens is not None and dict(added_tokens) != engine.added_tokens:
                raise InputError(f"{origin}: a tokenizer.json names its added tokens itself; add them there")
        else:
            engine = SentencePieceEngine(model, added_tokens, origin)
        self._engine = engine
        self.companions = dict(companions or {})
        self.model, self.num_pieces, self.vocab_size = engine.model, engine.num_pieces, engine.vocab_size
        self.added_tokens, self.special_tokens = engine.added_tokens, engine.special_tokens
        self.bos_id, self.unk_id = engine.bos_id, engine.unk_id
        self.eos_id, self.pad_id = engine.eos_id, engine.pad_id
        image_id = engine.token_id(IMAGE_TOKEN)
        assert image_id is not None, "an engine gives <image> an id"
        self.image_id: int = image_id
        self._split = _pattern(self.special_tokens)
        self._controls = frozenset(self.special_tokens.values()) - {self.unk_id}
        self.sha256 = self._identity()

    @classmethod
    def load(cls, path: str | Path, new_tokens: Sequence[str] = ()) -> Tokenizer:
        """The tokenizer in a directory (tokenizer.model, optionally with tokenizer_config.megamm.json; else
        tokenizer.json with tokenizer_config.json and special_tokens_map.json) or a bare file of either kind.

        Args:
            new_tokens: get the next free ids, in this order; `<image>` follows them if it is missing.

        Raises:
            InputError: missing or damaged files, contradictory added tokens, a new token that is there.
        """
        path = Path(path)
        model_path = path
        if path.is_dir():
            names = [name for name in (MODEL_FILE, HF_FILE) if (path / name).exists()]
            model_path = path / (names or [MODEL_FILE])[0]
        try:
            model = read_whole(model_path)
            beside = [path / name for name in COMPANION_FILES] if path.is_dir() and is_json(model) else []
            companions = {file.name: read_whole(file) for file in beside if file.exists()}
        except OSError as error:
            raise InputError(
                f"{model_path}: cannot read the tokenizer ({error.strerror}); give a tokenizer directory, "
                "a SentencePiece .model file or a tokenizer.json"
            ) from None
        origin, added = str(model_path), None
        if is_json(model):
            model = with_added(model, new_tokens, origin)
        else:
            config = path / CONFIG_FILE
            added = _read_config(config) if path.is_dir() and config.exists() else None
            if new_tokens:
                added = tokenizer_engine.extended(model, added, new_tokens, origin)
        return cls(model, added, origin, companions)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into `directory` (made if missing), for `load` and for transformers:
        tokenizer.model and tokenizer_config.megamm.json, or tokenizer.json and what came with it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # the vocabulary comes last: without what belongs to it, it would be another one
        for name, contents in reversed(self.files().items()):
            unfinished = directory / f".{name}.unfinished"
            unfinished.write_bytes(contents)
            os.replace(unfinished, directory / name)

    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        if self.is_huggingface:
            return {HF_FILE: self.model, **self.companions}
        config = {"format": CONFIG_VERSION, "added_tokens": self.added_tokens}
        return {MODEL_FILE: self.model, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}

    @property
    def is_huggingface(self) -> bool:
        """Whether the vocabulary is a tokenizer.json."""
        return is_json(self.model)

    def token_id(self, text: str) -> int | None:
        """Id of the token that is written so: an added token, a control token or a piece."""
        return self._engine.token_id(text)

    def tokens(self) -> dict[int, str]:
        """Id -> how the vocabulary writes it, of every token."""
        return self._engine.tokens()

    def token_text(self, token: int) -> str:
        """How an added or control token is written."""
        return next(text for text, i in self.special_tokens.items() if i == token)

    def encode(self, text: str, bos: bool = False, prefix: bool = True) -> list[int]:
        """Token ids of `text`, in which added and control tokens count as such.

        Args:
            bos: put the id of `<s>` in front, if the vocabulary has one.
            prefix: `text` starts the whole text; False for a continuation, which gets no word-start marker.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        return ids + self.encode_parts(self.cut(text), prefix)

    def cut(self, text: str, more: Mapping[str, int] | None = None) -> list[str | int]:
        """`text` as plain stretches and the ids of the control tokens between them.

        Args:
            more: names of further tokens to cut at.
        """
        names = self.special_tokens | dict(more or {})
        split = _pattern(names) if more else self._split
        parts: list[str | int] = []
        start = 0
        for match in split.finditer(text):
            parts += [text[start : match.start()], names[match.group()]]
            start = match.end()
        return [part for part in [*parts, text[start:]] if part != ""]

    def encode_parts(self, parts: Iterable[str | int], prefix: bool = True) -> list[int]:
        """Token ids of plain stretches and ready ids. A stretch is words of somebody: what is written like a
        control token is encoded as ordinary characters. Neighbouring stretches are one.

        Args:
            prefix: the parts start the whole text.
        """
        return self.encode_runs([list(parts)], prefix)[0]

    def encode_runs(
        self,
        runs: Sequence[Sequence[str | int]],
        prefix: bool = True,
        more: Mapping[str, int] | None = None,
    ) -> list[list[int]]:
        """Token ids of each run of parts as of `encode_parts`, where the runs together are one text: no piece
        reaches from one run into the next.

        Args:
            more: further control tokens, as of `cut`.
        """
        found: list[list[int]] = []
        place: Place = "start" if prefix else "middle"
        for run in runs:
            ids: list[int] = []
            for is_text, group in groupby(run, key=lambda part: isinstance(part, str)):
                if is_text:
                    text = "".join(group)  # type: ignore[arg-type]
                    if text:
                        ids += self._encode_stretch(text, place, more or {})
                        place = "middle"
                else:
                    ids += group  # type: ignore[arg-type]
                    place = "behind_control"
            found.append(ids)
        return found

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; `skip_special` leaves out added and control tokens.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._engine.decode(ids, skip_special)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[object, ...]]:
        added = None if self.is_huggingface else self.added_tokens
        return type(self), (self.model, added, "tokenizer", self.companions)

    def _encode_stretch(self, text: str, place: Place, more: Mapping[str, int]) -> list[int]:
        ids = self._engine.encode(text, place)
        if self._controls.isdisjoint(ids) and (not more or set(more.values()).isdisjoint(ids)):
            return ids
        # The library takes the written name of a control token for the token: show it no whole name.
        cuts = [match.start() + 1 for match in _pattern(self.special_tokens | dict(more)).finditer(text)]
        edges = [0, *cuts, len(text)]
        pieces = [text[start:end] for start, end in pairwise(edges) if end > start]
        places: list[Place] = [place, *(["middle"] * (len(pieces) - 1))]  # type: ignore[list-item]
        return [i for piece, at in zip(pieces, places, strict=True) for i in self._engine.encode(piece, at)]

    def _identity(self) -> str:
        digest = hashlib.sha256(self.model)
        digest.update(json.dumps(self.added_tokens, sort_keys=True).encode())
        if self.is_huggingface:
            digest.update(json.dumps([self.bos_id, self.eos_id, self.unk_id, self.pad_id]).encode())
        return digest.hexdigest()


def is_json(model: bytes) -> bool:
    """Whether the contents of a tokenizer file are those of a tokenizer.json."""
    return model[:1] == b"{"


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names, the longest where several begin."""
    return re.compile("|".join(re.escape(text) for text in sorted(names, key=len, reverse=True)))


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


def _read_config(path: Path) -> dict[str, int]:
    problem = InputError(f"{path}: is not a megamm tokenizer description; copy it again or remove it")
    try:
        config = json.loads(read_whole(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise problem from None
    if not isinstance(config, dict) or config.get("format") != CONFIG_VERSION:
        raise problem
    added = config.get("added_tokens")
    if isinstance(added, dict) and all(text and type(i) is int for text, i in added.items()):
        return added
    raise problem
