"""ShareGPT, messages and plain text: what is taken, left out and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megamm.data.conversation import Conversation, Skipped
from megamm.data.formats import make_format
from megamm.data.formats import text as text_format
from megamm.data.templates import Turn
from megamm.errors import InputError
from tests.data.formats.example import write_json, write_lines


def read(format: str, path: Path) -> list[Conversation | Skipped]:
    reader = make_format(format)
    return [entry for chunk in reader.chunks([path]) for entry in reader.read(chunk)]


def chat(*turns: tuple[str, Any], **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | fields


SKIPPED = [
    (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "do not alternate"),
    (chat(("user", "a")), "do not alternate"),
    (chat(("assistant", "a"), ("user", "b"), ("user", "c")), "do not alternate"),
    (chat(("user", "a"), ("system", "b"), ("assistant", "c")), "do not alternate"),
    (chat(("user", "a"), ("tool", "b"), ("assistant", "c")), "a turn of 'tool'"),
    (chat(("user", "a"), ("assistant", "b"), videos=["v.mp4"]), "videos"),
    (chat(("user", [{"type": "video"}]), ("assistant", "b")), "neither text nor image"),
    (chat(("user", "<image><image>"), ("assistant", "b"), images=["1"]), "2 <image> placeholders, 1 images"),
    (chat(("user", "an <image> tag"), ("assistant", "b")), "1 <image> placeholders, 0 images"),
    (chat(("user", "a"), ("assistant", "<image>"), images=["1"]), "in an answer"),
    (chat(("user", [{"type": "image"}]), ("assistant", "b")), "1 <image> placeholders, 0 images"),
]
WRONG = [
    (chat(("user", 7), ("assistant", "b")), '"content" is 7'),
    (chat(("user", None), ("assistant", "b")), '"content" is None'),
    (chat(("user", "\ud800"), ("assistant", "b")), '"content" is'),
    (chat((7.5, "a"), ("assistant", "b")), '"role" is 7.5'),
    (chat(("user", [7]), ("assistant", "b")), "turn 1: is no JSON object"),
    (chat(("user", [{"type": "text"}]), ("assistant", "b")), 'has no "text"'),
    (chat(("user", "a"), ("assistant", "b"), images=[{"bytes": "x"}]), "must be given by its path"),
    (chat(("user", "a"), ("assistant", "b"), images=["data:image/png;base64,AA"]), "write it to a file"),
    (chat(("user", [{"type": "image", "image": "1"}]), ("assistant", "b"), images=["2"]), "use one way"),
    ({"text": "a"}, 'has no "conversations"'),
    ({"messages": {}}, '"messages" is {}'),
    (["a"], "is no JSON object"),
]


@pytest.mark.parametrize("entry, reason", SKIPPED)
def test_chats_that_are_left_out(entry: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (found,) = read("sharegpt", write_json(tmp_path / "a.json", [entry | {"id": "x"}]))
    assert isinstance(found, Skipped) and reason in found.reason and found.key == "x"


@pytest.mark.parametrize("entry, message", WRONG)
def test_wrong_chats(entry: Any, message: str, tmp_path: Path) -> None:
    good = chat(("user", "a"), ("assistant", "b"))
    with pytest.raises(InputError) as caught:
        read("sharegpt", write_lines(tmp_path / "a.jsonl", [good, entry]))
    assert message in str(caught.value) and "a.jsonl: entry 2" in str(caught.value)


def test_images_that_parts_name(tmp_path: Path) -> None:
    parts = [
        {"type": "image", "image": "file:///data/1.jpg"},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": "https://a.b/2.jpg"},
    ]
    (found,) = read("sharegpt", write_json(tmp_path / "a.json", [chat(("user", parts), ("assistant", "b"))]))
    assert isinstance(found, Conversation)
    assert found.images == ["/data/1.jpg", ("https://a.b/2.jpg", "2.jpg")]
    assert found.turns[0].text == "<image>\nand<image>\n"


def test_system_messages(tmp_path: Path) -> None:
    """They stay turns of their own, at the start or beside the turns: the template has its place for them."""
    turns = [Turn("user", "a"), Turn("assistant", "b")]
    for entry, system in (
        (chat(("system", " Be <image>brief. "), ("user", "a"), ("assistant", "b")), "Be brief."),
        (chat(("user", "a"), ("assistant", "b"), system="Be brief."), "Be brief."),
        (chat(("system", " "), ("user", "a"), ("assistant", "b"), system=None), ""),
    ):
        (found,) = read("sharegpt", write_json(tmp_path / "a.json", [entry]))
        assert isinstance(found, Conversation)
        assert found.turns == ([Turn("system", system)] if system else []) + turns
    (found,) = read("sharegpt", write_json(tmp_path / "a.json", [entry | {"system": "S", "images": ["1"]}]))
    assert isinstance(found, Conversation)
    assert found.turns == [Turn("system", "S"), Turn("user", "<image>\na"), turns[1]]


def test_text_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfOne\n\nTwo\n")
    (found,) = read("text", path)
    assert isinstance(found, Conversation) and found.turns[0].text == "One\n\nTwo\n"
    path.write_text(" \n")
    assert isinstance(read("text", path)[0], Skipped)
    monkeypatch.setattr(text_format, "MAX_FILE", 10)
    for data, message in ((b"\xff", "not UTF-8"), (b"x" * 11, "more than 10 bytes.*jsonl")):
        path.write_bytes(data)
        with pytest.raises(InputError, match=rf"a\.txt: .*{message}"):
            read("text", path)
    with pytest.raises(InputError, match=r"no\.txt: cannot be read"):
        read("text", tmp_path / "no.txt")
    with pytest.raises(InputError, match='entry 1: "text" is 7'):
        read("text", write_lines(tmp_path / "a.jsonl", [{"text": 7}]))
