"""What every source format is read into."""

from __future__ import annotations

from typing import Literal, NamedTuple, Union

from megamm.data.templates import Turn


class TarPlace(NamedTuple):
    """An image whose place in a tar file the source itself tells.

    Attributes:
        tar: path of the tar file.
        name: of the image, for reports.
        offset, length: of its bytes in the tar.
        encoding: "base64": the bytes there are the text of the image in base64.
    """

    tar: str
    name: str
    offset: int
    length: int
    encoding: Literal["raw", "base64"] = "raw"


# A name to look up, several of them (the first that is found counts), or a place that is known.
ImageRef = Union[str, tuple[str, ...], TarPlace]


class Conversation(NamedTuple):
    """One entry of a source: as many `<image>` placeholders in the turns as there are images.

    Attributes:
        key: the entry's own id, for reports.
        position: of the entry in its file, from 0.
        images: the images, in the order of their placeholders.
        turns: question, answer, question, answer, ...; or one turn of the role "document", a text with
            images in it (interleaved) or none.
        task: what is asked ("caption", "vqa", "vizwiz", "choice", ...): selects the words that an
            instruction set adds; "" for conversations that bring their own.
    """

    key: str
    position: int
    images: list[ImageRef]
    turns: list[Turn]
    task: str = ""


class Skipped(NamedTuple):
    """An entry that a reader leaves out, and why.

    Attributes:
        key, position: as of a Conversation.
        reason: a few words, for skipped.jsonl.
    """

    key: str
    position: int
    reason: str
