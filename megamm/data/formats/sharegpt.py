"""Chats: ShareGPT's "conversations" of from/value, and "messages" of role/content as OpenAI's interface,
LLaMA-Factory and ms-swift write them.

Content is a text, in which `<image>` stands for the images listed in "images" (or "image"), or a list of
parts {"type": "text", "text"} and {"type": "image"} (the next of "images", or the part's own "image", "path"
or "url", or {"type": "image_url", "image_url": {"url"}}).
"""

from __future__ import annotations

from typing import Any

from megamm.data.conversation import Conversation, ImageRef, Skipped
from megamm.data.formats.dialogue import alternates, trimmed
from megamm.data.formats.fields import Fields, encodable, is_name, plain
from megamm.data.formats.interleaved import url_names
from megamm.data.formats.records import RecordFormat
from megamm.data.templates import Turn
from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError

ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
}
MEDIA = ("video", "videos", "audio", "audios")


class ShareGpt(RecordFormat):
    """A system message, at the start or as LLaMA-Factory's "system", becomes the template's. An answer before
    the first question and a question after the last answer are dropped; images without any placeholder go
    before the first question. Chats with other roles (tools), turns that do not alternate, or other media
    are left out, and those with more or fewer placeholders than images."""

    def entry(self, value: Any, position: int, where: str) -> Conversation | Skipped:
        entry = Fields(value, where)
        key = entry.identifier("id") if entry.entry.get("id") not in (None, "") else str(position)
        if any(entry.entry.get(name) for name in MEDIA):
            return Skipped(key, position, "has videos or sounds")
        chat = _Chat(entry)
        if chat.odd:
            return Skipped(key, position, chat.odd)
        system, turns = _system_apart(chat.turns)
        system = system or entry.text_or_none("system")
        turns = trimmed(turns)
        if not turns or not alternates(turns):
            return Skipped(key, position, "questions and answers do not alternate")
        return _with_images(key, position, turns, chat.images, system)


class _Chat:
    """The turns of an entry, and its images in the order of their placeholders."""

    def __init__(self, entry: Fields):
        self.listed = _images(entry)
        self.own: list[ImageRef] = []  # images that parts of the content bring themselves
        self.parts = 0  # image parts that stand for the next image in the list
        self.odd = ""
        name = "messages" if "messages" in entry.entry else "conversations"
        self.turns = [
            turn
            for number, item in enumerate(entry.listed(name))
            if (turn := self._turn(Fields(item, f"{entry.where}, turn {number + 1}"))) is not None
        ]
        if self.own and (self.parts or self.listed):
            raise InputError(f"{entry.where}: names images both in its parts and beside them; use one way")

    @property
    def images(self) -> list[ImageRef]:
        return self.own or self.listed

    def _turn(self, item: Fields) -> tuple[str, str] | None:
        role_key, text_key = ("role", "content") if "role" in item.entry else ("from", "value")
        role = item.text(role_key)
        if role not in ROLES:
            self.odd = f"has a turn of {role[:40]!r}"
        content = item.entry.get(text_key)
        if isinstance(content, list):
            text = "".join(self._part(Fields(part, item.where)) for part in content)
        elif content is None and role not in ROLES:
            text = ""
        elif isinstance(content, str) and encodable(content):
            text = content
        else:
            raise item.problem(text_key, "a text or a list of parts")
        return ROLES.get(role, role), text

    def _part(self, part: Fields) -> str:
        kind = part.entry.get("type")
        if kind == "text":
            text = part.entry.get("text")
            if not isinstance(text, str) or not encodable(text):
                raise part.problem("text", "a text")
            return plain(text)
        if kind not in ("image", "image_url"):
            self.odd = "has a part that is neither text nor image"
            return ""
        given = [part.entry[name] for name in ("image", "image_url", "path", "url") if part.entry.get(name)]
        if given:
            self.own.append(_image(given[0], part.where))
        else:
            self.parts += 1
        return f"{IMAGE_TOKEN}\n"


def _system_apart(turns: list[tuple[str, str]]) -> tuple[str, list[Turn]]:
    """What the system says at the start, and the other turns. What it says later stays a turn, which no
    answer alternates with."""
    system = ""
    if turns and turns[0][0] == "system":
        system, turns = plain(turns[0][1]).strip(), turns[1:]
    return system, [Turn(role, text) for role, text in turns]  # type: ignore[arg-type]


def _with_images(
    key: str, position: int, turns: list[Turn], images: list[ImageRef], system: str
) -> Conversation | Skipped:
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if images and not placeholders:
        turns = [Turn("user", f"{IMAGE_TOKEN}\n" * len(images) + turns[0].text), *turns[1:]]
    elif placeholders != len(images):
        return Skipped(key, position, f"has {placeholders} {IMAGE_TOKEN} placeholders, {len(images)} images")
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role == "assistant"):
        return Skipped(key, position, f"has an {IMAGE_TOKEN} placeholder in an answer")
    return Conversation(key, position, images, [Turn("system", system), *turns] if system else turns)


def _images(entry: Fields) -> list[ImageRef]:
    value = entry.entry.get("images", entry.entry.get("image"))
    if value is None or value == "":
        return []
    return [_image(name, entry.where) for name in (value if isinstance(value, list) else [value])]


def _image(value: Any, where: str) -> ImageRef:
    """An image that is named by a text, or by an object with a path or URL."""
    if isinstance(value, dict):
        value = value.get("path") or value.get("url")
    if not is_name(value):
        raise InputError(f"{where}: an image must be given by its path; correct the entry")
    if value.startswith("data:"):
        raise InputError(f"{where}: holds an image itself (data:...); write it to a file and name that")
    name: str = value.removeprefix("file://")
    return url_names(name) if "://" in name else name
