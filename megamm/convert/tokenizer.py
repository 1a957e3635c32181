"""Tokenizers both ways: megamm's directory to the files that transformers loads, with the same ids, and back.

A tokenizer.json goes out as it came in. A SentencePiece model is described in the terms of the tokenizers
library:

SentencePiece's BPE joins the neighbouring pair whose union is the piece of highest score; the tokenizers
library joins the pair that stands first in a list of merges. So the merges are all ways to split a piece
in two, ordered by the score of the piece. Everything else of megamm's rule of encoding (word-start marker
at the start of the text only, added and control tokens cut out first) has its counterpart by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megamm.convert.engine import read_json, write_json
from megamm.data.tokenizer import CONFIG_FILE, HF_FILE, IMAGE_TOKEN, MODEL_FILE, SPACE, Tokenizer
from megamm.data.tokenizer_huggingface import SETTINGS_FILE, without_last
from megamm.errors import InputError
from megamm.whole_files import read_whole

# Of sentencepiece_model.proto: model type and piece types.
_BPE = 2
_NORMAL, _USER_DEFINED, _UNUSED = 1, 4, 5


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_positions: int, has_images: bool) -> None:
    """Write megamm's own files and those that transformers loads.

    Args:
        has_images: whether there is an embedding for `<image>`; if not, it is the last token and is left out.
    """
    tokenizer.save(directory)
    if not tokenizer.is_huggingface:
        write_json(directory / HF_FILE, tokenizer_json(tokenizer, directory / MODEL_FILE, has_images))
        write_json(directory / SETTINGS_FILE, tokenizer_config(tokenizer, max_positions, has_images))
        return
    if not has_images:
        (directory / HF_FILE).write_bytes(without_last(tokenizer.model, IMAGE_TOKEN))
    if SETTINGS_FILE not in tokenizer.companions:
        roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}
        names = {f"{role}_token": tokenizer.token_text(i) for role, i in roles.items() if i is not None}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(directory / SETTINGS_FILE, {**settings, **names, "model_max_length": max_positions})


def tokenizer_json(tokenizer: Tokenizer, model_file: Path, has_images: bool = True) -> dict[str, Any]:
    """The contents of tokenizer.json: `<s>`, then the ids that `tokenizer.encode` gives.

    Args:
        model_file: the SentencePiece model of the tokenizer.
        has_images: whether there is an embedding for `<image>`.

    Raises:
        InputError: the model is none of LLaMA's kind, so the ids would differ.
    """
    from tokenizers import AddedToken, decoders, pre_tokenizers, processors
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers.models import BPE

    model = _read_model(model_file)
    pieces = [piece.piece for piece in model.pieces]
    bos_id, unk_id = tokenizer.bos_id, tokenizer.unk_id
    assert bos_id is not None and unk_id is not None, "a SentencePiece model has both"
    found = HFTokenizer(
        BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=merges_of(model),
            unk_token=pieces[unk_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    found.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    found.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bos = pieces[bos_id]
    found.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, bos_id)],
    )
    specials = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    found.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, _ in specials
            if has_images or token != IMAGE_TOKEN
        ]
    )
    contents: dict[str, Any] = json.loads(found.to_str())
    return contents


def tokenizer_config(tokenizer: Tokenizer, max_positions: int, has_images: bool = True) -> dict[str, Any]:
    """tokenizer_config.json, which goes with `tokenizer_json`."""
    names: dict[int | None, str] = {index: token for token, index in tokenizer.special_tokens.items()}
    images = {
        "processor_class": "LlavaProcessor",
        "extra_special_tokens": {"image_token": IMAGE_TOKEN},
        "image_token": IMAGE_TOKEN,
    }
    return {
        **(images if has_images else {}),
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "unk_token": names[tokenizer.unk_id],
        "pad_token": names[tokenizer.pad_id],
        "legacy": False,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "left",
    }


def merges_of(model: Any) -> list[tuple[str, str]]:
    """All pairs of pieces whose union is a piece, in the order in which SentencePiece joins them."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ranked = [
        (-score, len(left), (left, right))
        for word, score in scores.items()
        for left, right in ((word[:cut], word[cut:]) for cut in range(1, len(word)))
        if left in scores and right in scores
    ]
    ranked.sort(key=lambda item: item[:2])
    return [pair for _, _, pair in ranked]


def _read_model(path: Path) -> Any:
    """The SentencePiece model as its protocol buffer message, checked to be of LLaMA's kind."""
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(read_whole(path))  # Tokenizer has read these bytes before
    types = {piece.type for piece in model.pieces}
    reasons = {
        "is no BPE model": model.trainer_spec.model_type != _BPE,
        "has no byte fallback": not model.trainer_spec.byte_fallback,
        "normalises text": bool(model.normalizer_spec.precompiled_charsmap),
        "has user-defined pieces": _USER_DEFINED in types,
        "has unused pieces": _UNUSED in types,
    }
    unfit = [reason for reason, found in reasons.items() if found]
    if unfit:
        raise InputError(
            f"{path}: {' and '.join(unfit)}; only SentencePiece models of LLaMA's kind can be exported, train"
            " such a one with megamm prepare"
        )
    return model


def tokenizer_from_hf(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, or None if it has neither a SentencePiece model nor a
    tokenizer.json; where it has both, the model counts.

    Added tokens of a model are those of megamm's own description where export left one, else those that the
    Hugging Face files name behind the pieces; `<image>` gets the next free id if it is not among them.

    Raises:
        InputError: the files are damaged or contradict each other.
    """
    model_file = directory / MODEL_FILE
    if not model_file.is_file():
        return Tokenizer.load(directory) if (directory / HF_FILE).is_file() else None
    if (directory / CONFIG_FILE).exists():
        return Tokenizer.load(directory)
    plain = Tokenizer.load(model_file)
    added: dict[str, int] = {}
    for token, index, path in _added_tokens(directory):
        if index < plain.num_pieces:
            continue  # a piece of the model, marked as special
        if added.setdefault(token, index) != index:
            raise InputError(f"{path}: {token} has id {index}, elsewhere {added[token]}; correct one of them")
    if not added:
        return plain
    if IMAGE_TOKEN not in plain.special_tokens or IMAGE_TOKEN in plain.added_tokens:
        added.setdefault(IMAGE_TOKEN, plain.num_pieces + len(added))
    return Tokenizer(read_whole(model_file), added, origin=str(directory))


def _added_tokens(directory: Path) -> Iterator[tuple[str, int, Path]]:
    """Added tokens as three generations of files name them: (token, id, file)."""
    path = directory / "added_tokens.json"
    if path.exists():
        for token, index in read_json(path).items():
            yield *_token(token, index, path), path
    path = directory / "tokenizer_config.json"
    if path.exists():
        entries = read_json(path).get("added_tokens_decoder") or {}
        for index, entry in entries.items() if isinstance(entries, dict) else ():
            yield *_token(entry.get("content") if isinstance(entry, dict) else None, index, path), path
    path = directory / "tokenizer.json"
    if path.exists():
        listed = read_json(path).get("added_tokens") or []
        for entry in listed if isinstance(listed, list) else ():
            fields = entry if isinstance(entry, dict) else {}
            yield *_token(fields.get("content"), fields.get("id"), path), path


def _token(token: Any, index: Any, path: Path) -> tuple[str, int]:
    number = int(index) if isinstance(index, str) and index.isdecimal() else index
    if not isinstance(token, str) or not token or type(number) is not int:
        raise InputError(f"{path}: {token!r} with id {index!r} is no added token; fetch the file again")
    return token, number
