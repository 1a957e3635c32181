"""A conversation as a file: LLaVA's JSON, which `megamm prepare` and `evaluate` read, or plain text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megamm.chat.conversation import Conversation, Exchange
from megamm.inference.questions import with_places, words


def save(conversation: Conversation, path: Path) -> None:
    """Write the conversation: as LLaVA JSON if the name ends in .json, otherwise as text.

    Raises:
        OSError: it cannot be written.
    """
    is_json = path.suffix.lower() == ".json"
    path.write_text(as_llava(conversation) if is_json else as_text(conversation), encoding="utf-8")


def as_llava(conversation: Conversation) -> str:
    """One entry for the conversation; one for each question where they were asked by themselves."""
    parts = [conversation.exchanges] if conversation.has_memory else [[one] for one in conversation.exchanges]
    entries = [_entry(f"chat-{number}", part, conversation.system) for number, part in enumerate(parts)]
    return json.dumps(entries, indent=2, ensure_ascii=False) + "\n"


def as_text(conversation: Conversation) -> str:
    """As it is read: who says what, and which pictures were shown."""
    lines = [] if conversation.system is None else [f"System: {conversation.system}"]
    for exchange in conversation.exchanges:
        lines += [f"(picture {picture})" for picture in exchange.pictures]
        lines += [f"User: {exchange.question}", f"Model: {exchange.answer}", ""]
    return "\n".join(lines) + "\n"


def _entry(key: str, exchanges: Sequence[Exchange], system: str | None) -> dict[str, Any]:
    pictures = [str(picture.absolute()) for exchange in exchanges for picture in exchange.pictures]
    turns = []
    for exchange in exchanges:
        turns.append({"from": "human", "value": with_places(exchange.question, len(exchange.pictures))})
        turns.append({"from": "gpt", "value": words(exchange.answer)})
    entry: dict[str, Any] = {"id": key, "conversations": turns}
    if pictures:
        entry["image"] = pictures[0] if len(pictures) == 1 else pictures
    if system is not None:
        entry["system"] = system
    return entry
