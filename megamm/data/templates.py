"""Prompt templates: how turns become one text, and which of its tokens carry loss.

The templates are data: presets/templates.yaml. A rendered text has two kinds of parts. The template's own
words may contain control tokens (`</s>`, `<image>`, ...), which become their ids. The words of a turn are
plain text: what is written there like a control token is encoded as ordinary characters, so no question and
no web page can end a turn, or begin one. The one exception is `<image>`, the placeholder of an image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError

PRESETS = Path(__file__).parent / "presets" / "templates.yaml"
BEGIN, END = "<s>", "</s>"


class Turn(NamedTuple):
    """One utterance, or a whole document; its text may contain `<image>` placeholders.

    A system message stands before the first question and replaces the template's own.
    """

    role: Literal["system", "user", "assistant", "document"]
    text: str


class Segment(NamedTuple):
    """A stretch of the rendered text, and whether its tokens are learnt."""

    text: str
    learnt: bool


class Part(NamedTuple):
    """A piece of a rendered text: words of the template, in which control tokens count, or of a turn."""

    text: str
    learnt: bool
    is_markup: bool


@dataclass(frozen=True)
class Template:
    """How a conversation or a document is written down.

    Attributes:
        takes: "conversation": questions and answers in turn; "pair": images and one answer (a caption);
            "document": one turn of that role.
        question: a user's turn, with {system} (the system part, before the first question only) and
            {question}, or {images}: of the question nothing but its images.
        answer: an assistant's turn with {answer}.
        system: the system part with {system}, the system message; "" where there is no room for one.
        default_system: the message of conversations that bring none; None leaves the part out.
        again: stands before every question but the first.
        after: stands behind an answer and is not learnt.
        image: what an image in a question or document is written as.
        place: of the images: at the "front" of their turn, or where they are among the "words" (the spaces
            around them removed). In a document, what `image` has before `<image>` is left out at the first.
        end: stands behind a document.
        learnt: "answers": answers with the words around them; "chunks": from each `<image>` to the next
            `<|endofchunk|>`; "all". `<image>` and the `<s>` in front never are.
        tokens: control tokens that the vocabulary must have.
        stop: texts that end an answer, besides `</s>`.
    """

    name: str
    takes: Literal["conversation", "pair", "document"]
    question: str = ""
    answer: str = ""
    system: str = ""
    default_system: str | None = None
    again: str = ""
    after: str = ""
    image: str = IMAGE_TOKEN
    place: Literal["front", "words"] = "front"
    end: str = ""
    learnt: Literal["answers", "chunks", "all"] = "answers"
    tokens: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()

    @classmethod
    def by_name(cls, name: str) -> Template:
        """The template of that name.

        Raises:
            InputError: there is none.
        """
        templates = load_templates(PRESETS)
        if name not in templates:
            raise InputError(f"template: there is no {name!r}; choose one of {', '.join(templates)}")
        return templates[name]

    def segments(self, turns: Sequence[Turn]) -> list[Segment]:
        """The rendered text (without the `<s>` in front) in stretches that are learnt or not. In a document,
        which tokens of it are learnt depends on its images.

        Raises:
            InputError: turns do not alternate, or the template takes something else.
        """
        runs = groupby(self.parts(turns), key=lambda part: part.learnt)
        return [Segment("".join(part.text for part in run), learnt) for learnt, run in runs]

    def parts(self, turns: Sequence[Turn]) -> list[Part]:
        """The rendered text, cut where words of the template and of the turns meet.

        Raises:
            InputError: as of `segments`.
        """
        system, turns = self._check(turns)
        found: list[Part] = []
        for position, (role, text) in enumerate(turns):
            if role == "document":
                found += self._words(text, True, is_document=True)
                found.append(Part(self.end, True, True))
            elif role == "user":
                if position:
                    found.append(Part(self.again, False, True))
                fill = {"system": self._system(system) if position == 0 else []}
                fill["question"] = self._words(text, False)
                fill["images"] = [Part(IMAGE_TOKEN * text.count(IMAGE_TOKEN), False, True)]
                found += _filled(self.question, fill, False)
            else:
                found += _filled(self.answer, {"answer": list(_answer(text))}, True)
                found.append(Part(self.after, False, True))
        return [part for part in found if part.text]

    def render(self, turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Token ids of turns, beginning with `<s>` where the vocabulary has it, and which carry loss.

        What is learnt and what is not are encoded apart, so a prompt has the same ids as in training. No
        piece reaches over these borders anyway, unless an answer begins with a newline (byte-level BPE).

        Raises:
            InputError: as of `segments`; the vocabulary lacks a token of the template.
        """
        words = _Words.of(self, tokenizer)
        parts = self.parts(turns)
        runs = [
            (learnt, [item for part in run for item in words.items(part)])
            for learnt, run in groupby(parts, key=lambda part: part.learnt)
        ]
        ids = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        mask = [False] * len(ids)
        encoded = tokenizer.encode_runs([items for _, items in runs], more=words.names)
        for (learnt, _), new in zip(runs, encoded, strict=True):
            ids += new
            mask += [learnt and token != tokenizer.image_id for token in new]
        if self.learnt == "chunks":
            mask = _within_chunks(ids, mask, tokenizer.image_id, words.names[self.tokens[0]])
        return ids, mask

    def prompt_text(self, turns: Sequence[Turn]) -> str:
        """The text that a model is asked to continue: turns that end with a question."""
        if self.takes == "document":
            raise InputError(
                f"template {self.name}: {_TAKES['document']}; use the template {self._fitting()}"
            )
        if not turns or turns[-1].role != "user":
            raise InputError("prompt: the last turn must be a question; add one")
        return "".join(part.text for part in self.parts(turns))

    def prompt(self, turns: Sequence[Turn], tokenizer: Tokenizer) -> list[int]:
        """Token ids of `prompt_text`, beginning with `<s>` where the vocabulary has it."""
        self.prompt_text(turns)
        return self.render(turns, tokenizer)[0]

    def stop_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Tokens that end an answer."""
        words = _Words.of(self, tokenizer)
        ends = [tokenizer.encode_runs([words.items(Part(text, True, True))])[0][-1:] for text in self.stop]
        return sorted({tokenizer.eos_id, *(i for end in ends for i in end)})

    def control_tokens(self, tokenizer: Tokenizer) -> dict[str, int]:
        """The template's own control tokens in the ids of a vocabulary."""
        return _Words.of(self, tokenizer).names

    def _words(self, text: str, learnt: bool, is_document: bool = False) -> list[Part]:
        """The words of a turn with its images where the template puts them."""
        pieces = text.split(IMAGE_TOKEN)
        if len(pieces) == 1:
            return [Part(text, learnt, False)]
        image = Part(self.image, learnt, True)
        if self.place == "front":
            return [*([image] * (len(pieces) - 1)), Part("".join(pieces).strip(), learnt, False)]
        parts = [Part(pieces[0].rstrip(), learnt, False)]
        for number, piece in enumerate(pieces[1:], 1):
            parts.append(Part(IMAGE_TOKEN, learnt, True) if is_document and number == 1 else image)
            parts.append(Part(piece.strip() if number < len(pieces) - 1 else piece.lstrip(), learnt, False))
        return parts

    def _system(self, message: str | None) -> list[Part]:
        message = self.default_system if message is None else message
        if message is None:
            return []
        return list(_filled(self.system, {"system": [Part(message, False, False)]}, False))

    def _check(self, turns: Sequence[Turn]) -> tuple[str | None, Sequence[Turn]]:
        """The system message, if there is one, and the other turns."""
        roles = {turn.role for turn in turns}
        if self.takes == "document" or "document" in roles:
            self._check_document(turns)
            return None, turns
        system = None
        if turns and turns[0].role == "system":
            system, turns = turns[0].text, turns[1:]
            if not self.system:
                raise InputError(
                    f"template {self.name}: has no place for a system message; use the template vicuna"
                )
        for position, turn in enumerate(turns):
            if turn.role != ("user", "assistant")[position % 2]:
                raise InputError(
                    f"turn {position + 1}: questions and answers must alternate, a question first; "
                    "correct the conversation"
                )
        if self.takes == "pair" and len(turns) > 2:
            raise InputError(
                f"template {self.name}: a caption is one question and one answer, not {len(turns)} "
                f"turns; use the template {self._fitting()} for conversations"
            )
        return system, turns

    def _check_document(self, turns: Sequence[Turn]) -> None:
        is_document = [turn.role for turn in turns] == ["document"]
        if self.takes != "document":
            has_images = any(IMAGE_TOKEN in turn.text for turn in turns)
            fitting = "interleaved" if has_images else "text"
            raise InputError(f"template {self.name}: {_TAKES[self.takes]}; use the template {fitting}")
        if not is_document:
            raise InputError(
                f"template {self.name}: {_TAKES['document']}; use the template {self._fitting()}"
            )
        if self.learnt == "all" and IMAGE_TOKEN in turns[0].text:
            raise InputError(f"template {self.name}: the document has images; use the template interleaved")

    def _fitting(self) -> str:
        """A template for conversations in the manner of this one."""
        return "infimm" if self.tokens else "vicuna"


_TAKES = {
    "conversation": "takes questions and answers, not a document",
    "pair": "takes an image and its caption, not a document",
    "document": "takes a document, not questions and answers",
}


class _Words:
    """The words of a template in the ids of a vocabulary.

    Attributes:
        names: control tokens of the template: text -> id.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.names = {END: tokenizer.eos_id}
        if tokenizer.bos_id is not None:
            self.names[BEGIN] = tokenizer.bos_id
        for text in template.tokens:
            index = tokenizer.token_id(text)
            if index is None:
                raise InputError(
                    f"template {template.name}: the tokenizer has no token {text}; add it with `megamm"
                    f" prepare tokenizer --from T --add-token '{text}' --out DIR`"
                )
            self.names[text] = index
        self._tokenizer = tokenizer
        self._cut: dict[str, list[str | int]] = {}

    @staticmethod
    @lru_cache(maxsize=16)
    def of(template: Template, tokenizer: Tokenizer) -> _Words:
        """The words of `template`, made once per vocabulary."""
        return _Words(template, tokenizer)

    def items(self, part: Part) -> Sequence[str | int]:
        """What `Tokenizer.encode_runs` takes."""
        if not part.is_markup:
            return (part.text,)
        if part.text not in self._cut:
            text = part.text if BEGIN in self.names else part.text.replace(BEGIN, "")
            self._cut[part.text] = self._tokenizer.cut(text, self.names)
        return self._cut[part.text]


def _filled(pattern: str, fill: dict[str, list[Part]], learnt: bool) -> Iterator[Part]:
    """The words of a pattern, with the parts that its fields stand for."""
    for number, piece in enumerate(_FIELD.split(pattern)):
        if number % 2:
            yield from fill[piece]
        else:
            yield Part(piece, learnt, True)


def _answer(text: str) -> Iterator[Part]:
    for number, piece in enumerate(text.split(IMAGE_TOKEN)):
        if number:
            yield Part(IMAGE_TOKEN, True, True)
        yield Part(piece, True, False)


def _within_chunks(ids: list[int], mask: list[bool], image_id: int, end_id: int) -> list[bool]:
    """The mask without what stands outside of `<image>` ... `<|endofchunk|>`, the ends included in it."""
    found, inside = [], False
    for token, learnt in zip(ids, mask, strict=True):
        inside |= token == image_id
        found.append(learnt and inside)
        inside &= token != end_id
    return found


_FIELD = re.compile(r"\{(system|question|images|answer)\}")
_FIELDS_OF = {"question": {"system", "question", "images"}, "answer": {"answer"}, "system": {"system"}}


@cache
def load_templates(path: Path) -> dict[str, Template]:
    """The templates of a file, by name.

    Raises:
        InputError: an unknown or missing key, a value of the wrong kind, a field that the key does not have.
    """
    contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _template(name, values, f"{path}: {name}") for name, values in contents.items()}


def _template(name: str, values: Any, where: str) -> Template:
    if not isinstance(values, dict):
        raise InputError(f"{where}: is no mapping of keys to values; correct it")
    known = {field.name: field for field in fields(Template) if field.name != "name"}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"{where}: there is no key {key!r}; choose from {', '.join(known)}")
        allowed = _ALLOWED.get(key)
        if key in ("tokens", "stop"):
            if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
                raise InputError(f"{where}.{key}: is {value!r}; give a list of texts")
            value = tuple(value)
        elif not isinstance(value, str) or (allowed and value not in allowed):
            raise InputError(f"{where}.{key}: is {value!r}; give {' or '.join(allowed or ['a text'])}")
        if key in _FIELDS_OF and not set(re.findall(r"\{(\w*)\}", value)) <= _FIELDS_OF[key]:
            raise InputError(f"{where}.{key}: has other fields than {', '.join(sorted(_FIELDS_OF[key]))}")
        arguments[key] = value
    missing = [key for key, field in known.items() if field.default is MISSING and key not in arguments]
    if missing:
        raise InputError(f"{where}: {missing[0]} is missing; add it")
    template = Template(name=name, **arguments)
    if template.learnt == "chunks" and not template.tokens:
        raise InputError(f"{where}.tokens: is empty; name the token that ends a chunk first")
    return template


_ALLOWED = {
    "takes": ("conversation", "pair", "document"),
    "place": ("front", "words"),
    "learnt": ("answers", "chunks", "all"),
}
