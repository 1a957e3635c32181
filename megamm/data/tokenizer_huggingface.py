"""Hugging Face's tokenizers: byte-level BPE (GPT-2, Qwen, LLaMA 3) and LLaMA's BPE with byte fallback.

The ids are those of the file's own rules, with two differences that training data need. Control tokens
are recognised literally and only where megamm wants them, so words of a user can never become one; and a
text may be encoded in pieces: the word-start marker that a file puts in front of a text is left out where
a piece continues another. Both are edits of the file's contents before the library reads them.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megamm.data.tokenizer_engine import IMAGE_TOKEN, Place
from megamm.errors import InputError

SETTINGS_FILE = "tokenizer_config.json"
COMPANION_FILES = (SETTINGS_FILE, "special_tokens_map.json", "added_tokens.json")

# What the parts of a file may be; with these, what may stand in front of a stretch is known.
_NORMALIZERS = ("Sequence", "Prepend", "Replace", "NFC", "NFD", "NFKC", "NFKD")
_PRE_TOKENIZERS = ("Sequence", "Metaspace", "ByteLevel", "Split", "Digits")
_ROLES = ("bos", "eos", "unk", "pad")
# Without companions: what control tokens are called in the families that have just one name for them.
_USUAL_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>"),
    "unk": ("<unk>",),
    "pad": ("<pad>",),
}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class HuggingFaceEngine:
    """A tokenizer.json; it names its added tokens itself.

    Attributes:
        as of `tokenizer_engine.Engine`;
        companions: the files beside it, by name, as they came.
    """

    def __init__(self, model: bytes, companions: Mapping[str, bytes], origin: str) -> None:
        self.model, self.companions, self._origin = model, dict(companions), origin
        contents = _contents(model, origin)
        pieces: dict[str, int] = contents["model"]["vocab"]
        added = _listed(contents, origin)
        self.num_pieces = len(pieces)
        ids = pieces | added
        self.vocab_size = max(ids.values(), default=-1) + 1
        roles = _roles(self.companions, ids, origin)
        if "eos" not in roles:
            raise InputError(
                f"{origin}: nothing says which token ends a text; give the directory with its {SETTINGS_FILE}"
            )
        self.bos_id, self.unk_id = ids.get(roles.get("bos", "")), ids.get(roles.get("unk", ""))
        self.eos_id = ids[roles["eos"]]
        pads = (ids.get(roles.get("pad", "")), self.unk_id, self.eos_id)
        self.pad_id: int = next(i for i in pads if i is not None)
        self.added_tokens = {text: i for text, i in added.items() if text not in pieces}
        marked = {entry["content"] for entry in contents["added_tokens"] if entry.get("special")}
        marked |= {*roles.values(), IMAGE_TOKEN}
        self.special_tokens = dict(
            sorted(((text, ids[text]) for text in marked if text in ids), key=lambda item: item[1])
        )
        _refuse_others(contents, self.special_tokens, self.companions, ids, origin)
        self._ids = ids
        plain = _plain(contents, self.special_tokens)
        inner, self._repeats_prefix = _without_prefix(plain)
        self._start = _build(plain, origin)
        self._inner = self._start if inner == plain else _build(inner, origin)
        for text, index in added.items():
            if self._start.token_to_id(text) != index:
                raise InputError(
                    f"{origin}: the added token {text!r} cannot have the id {index}; the ids of added tokens"
                    " follow those of the vocabulary without gaps, fetch the file again"
                )

    def token_id(self, text: str) -> int | None:
        """Id of an added token or an entry of the vocabulary."""
        return self._ids.get(text)

    def tokens(self) -> dict[int, str]:
        """Id -> how it is written, of the vocabulary and the added tokens."""
        return {i: text for text, i in self._ids.items()}

    def encode(self, text: str, place: Place) -> list[int]:
        """Ids by the rules of the file."""
        prefixed = place == "start" or (place == "behind_control" and self._repeats_prefix)
        library = self._start if prefixed else self._inner
        ids: list[int] = _guarded(self._origin, library.encode, text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text by the file's decoder."""
        numbers = [int(i) for i in ids]
        text: str = _guarded(self._origin, self._start.decode, numbers, skip_special_tokens=skip_special)
        return text


def with_added(model: bytes, new: Iterable[str], origin: str) -> bytes:
    """The contents of tokenizer.json with `new` added tokens and, last, `<image>` if it is missing; the very
    bytes if nothing is added.

    Raises:
        InputError: a new token is one already.
    """
    contents = _contents(model, origin)
    known: dict[str, int] = contents["model"]["vocab"] | _listed(contents, origin)
    wanted = list(new)
    for text in wanted:
        if text in known or wanted.count(text) > 1:
            raise InputError(f"--add-token: {text!r} is a token of {origin} already; leave it out")
    if IMAGE_TOKEN not in (*known, *wanted):
        wanted.append(IMAGE_TOKEN)
    first = max(known.values(), default=-1) + 1
    for index, text in enumerate(wanted, first):
        contents["added_tokens"].append(_entry(text, index))
    return json.dumps(contents, indent=2, ensure_ascii=False).encode() if wanted else model


def without_last(model: bytes, token: str) -> bytes:
    """The contents of tokenizer.json without an added token that no other follows."""
    contents = _contents(model, "tokenizer.json")
    contents["added_tokens"] = [entry for entry in contents["added_tokens"] if entry["content"] != token]
    return json.dumps(contents, indent=2, ensure_ascii=False).encode()


def named_tokens(companions: Mapping[str, bytes], origin: str) -> dict[str, str]:
    """ "bos", "eos", "unk", "pad" -> the token of that role, as the files beside tokenizer.json say."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", SETTINGS_FILE):  # the second wins
        settings = _object(companions.get(name, b"{}"), f"{origin}: {name}")
        for role in _ROLES:
            value = settings.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                found[role] = text
            elif text is not None:
                raise InputError(f"{origin}: {name}: {role}_token is {text!r}; fetch the file again")
            elif f"{role}_token" in settings:
                found.pop(role, None)
    return found


def _roles(companions: Mapping[str, bytes], ids: Mapping[str, int], origin: str) -> dict[str, str]:
    if SETTINGS_FILE in companions or "special_tokens_map.json" in companions:
        found = named_tokens(companions, origin)
        for role, text in found.items():
            if text not in ids:
                raise InputError(
                    f"{origin}: {role}_token {text!r} has no id; correct it in {SETTINGS_FILE} beside it"
                )
        return found
    usual = {role: [n for n in names if n in ids] for role, names in _USUAL_NAMES.items()}
    return {role: names[0] for role, names in usual.items() if names}


def _refuse_others(
    contents: dict[str, Any],
    special: Mapping[str, int],
    companions: Mapping[str, bytes],
    ids: Mapping[str, int],
    origin: str,
) -> None:
    """Refuse control tokens that take more than their own characters, and those that only companions name."""
    for entry in contents["added_tokens"]:
        if entry["content"] in special and any(entry.get(k) for k in ("lstrip", "rstrip", "single_word")):
            raise InputError(
                f"{origin}: {entry['content']!r} takes spaces or words around it, which megamm does not;"
                " set its lstrip, rstrip and single_word to false"
            )
    named = set(_object(companions.get("added_tokens.json", b"{}"), f"{origin}: added_tokens.json"))
    listed = _object(companions.get(SETTINGS_FILE, b"{}"), f"{origin}: {SETTINGS_FILE}")
    entries = listed.get("added_tokens_decoder")
    for entry in entries.values() if isinstance(entries, dict) else ():
        named.add(str(entry.get("content")) if isinstance(entry, dict) else str(entry))
    for text in sorted(named - ids.keys()):
        raise InputError(
            f"{origin}: {text} has no id in tokenizer.json, but a file beside it names it; save the tokenizer"
            " again with transformers"
        )


def _contents(model: bytes, origin: str) -> dict[str, Any]:
    """The parsed file, every part of it that is used here checked."""
    contents = _object(model, origin)
    words = contents.get("model")
    if not isinstance(words, dict) or words.get("type", "BPE") != "BPE" or not _is_vocab(words.get("vocab")):
        raise InputError(f"{origin}: is no BPE tokenizer; use a SentencePiece .model or a BPE tokenizer.json")
    for part, allowed in (("normalizer", _NORMALIZERS), ("pre_tokenizer", _PRE_TOKENIZERS)):
        for node in _nodes(contents.get(part), origin):
            if node.get("type") not in allowed:
                raise InputError(
                    f"{origin}: its {part} {node.get('type')!r} is not known; use one of {', '.join(allowed)}"
                )
    if not isinstance(contents.setdefault("added_tokens", []), list):
        raise InputError(f"{origin}: added_tokens is no list; fetch the file again")
    return contents


def _object(data: bytes, origin: str) -> dict[str, Any]:
    try:
        contents = json.loads(data.decode("utf-8"))
        if _SURROGATE.search(data):
            json.dumps(contents, ensure_ascii=False).encode()  # half a character cannot be encoded
    except (ValueError, RecursionError):
        contents = None
    if not isinstance(contents, dict):
        raise InputError(f"{origin}: is no JSON object of a tokenizer; fetch the file again")
    return contents


def _is_vocab(vocab: Any) -> bool:
    """Text -> id, with every id from 0 on once."""
    return (
        isinstance(vocab, dict)
        and all(type(i) is int for i in vocab.values())
        and sorted(vocab.values()) == list(range(len(vocab)))
    )


def _listed(contents: dict[str, Any], origin: str) -> dict[str, int]:
    """Added tokens, by the file: text -> id."""
    found: dict[str, int] = {}
    for entry in contents["added_tokens"]:
        text, index = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(text, str) or not text or type(index) is not int or text in found:
            raise InputError(f"{origin}: {text!r} with id {index!r} is no added token; fetch the file again")
        found[text] = index
    return found


def _nodes(node: Any, origin: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer and all that it is a sequence of."""
    if node is None:
        return []
    inside = [node[k] for k in ("normalizers", "pretokenizers") if isinstance(node, dict) and k in node]
    if not isinstance(node, dict) or not all(isinstance(part, list) and None not in part for part in inside):
        raise InputError(f"{origin}: {node!r:.80} is no part of a tokenizer; fetch the file again")
    return [node, *(found for part in inside for item in part for found in _nodes(item, origin))]


def _entry(text: str, index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": text, **flags}


def _plain(contents: dict[str, Any], special: Mapping[str, int]) -> dict[str, Any]:
    """Contents for encoding stretches: every control token marked as such (the library then
    leaves it alone in a text), nothing put around, cut off or filled up."""
    entries = [entry | {"special": entry["content"] in special} for entry in contents["added_tokens"]]
    listed = {entry["content"] for entry in entries}
    entries += [_entry(text, index) for text, index in special.items() if text not in listed]
    nothing = {"truncation": None, "padding": None, "post_processor": None}
    return contents | {"added_tokens": entries} | nothing


def _without_prefix(contents: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Contents that put no word-start marker in front, and whether the original ones put it behind every
    control token too (else in front of the whole text at most)."""
    found = contents | {"pre_tokenizer": copy.deepcopy(contents.get("pre_tokenizer"))}
    repeats = False
    for node in _nodes(found.get("pre_tokenizer"), "tokenizer.json"):
        if node["type"] == "Metaspace":
            scheme = node.get("prepend_scheme", "always" if node.get("add_prefix_space", True) else "never")
            repeats |= scheme == "always"
            node.pop("add_prefix_space", None)
            node["prepend_scheme"] = "never"
        elif node["type"] == "ByteLevel":
            repeats |= bool(node.get("add_prefix_space", True))
            node["add_prefix_space"] = False
    repeats |= any(node["type"] == "Prepend" for node in _nodes(found.get("normalizer"), ""))
    return found | {"normalizer": _without_prepend(found.get("normalizer"))}, repeats


def _without_prepend(node: dict[str, Any] | None) -> dict[str, Any] | None:
    if node is None:
        return None
    if node["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    if "normalizers" in node:
        return node | {"normalizers": [_without_prepend(part) for part in node["normalizers"]]}
    return node


def _build(contents: dict[str, Any], origin: str) -> Any:
    """The library's tokenizer."""
    import tokenizers

    built = _guarded(origin, tokenizers.Tokenizer.from_str, json.dumps(contents))
    built.encode_special_tokens = True
    _guarded(origin, built.encode, "a b\n")
    return built


def _guarded(origin: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What the library answers; whatever it says or does about a bad file becomes an InputError."""
    problem: BaseException
    try:
        return call(*arguments, **options)
    except Exception as error:
        problem = error
    except BaseException as error:  # a panic of the library is no Exception
        if type(error).__name__ != "PanicException":
            raise
        problem = error
    reason = (str(problem).splitlines() or [""])[0][:200]
    raise InputError(f"{origin}: the tokenizers library refuses it ({reason}); fetch the file again")
