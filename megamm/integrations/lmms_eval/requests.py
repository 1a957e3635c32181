"""What a request of lmms-eval asks for, in megamm's words.

The arguments of a request are a tuple, whose length and order are those of lmms-eval 0.7
(`lmms_eval/api/task.py`, `construct_requests`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from megamm.data.templates import Turn
from megamm.errors import InputError
from megamm.inference import Decoding
from megamm.inference.asking import Picture
from megamm.inference.questions import with_places

_LONGEST = 1024  # where a task does not say; so do the models that lmms-eval brings
_PLAIN = ("1", "L", "LA", "P", "RGB", "RGBA")  # pixel layouts that PNG keeps


@dataclass(frozen=True)
class Asked:
    """One question of a task.

    Attributes:
        name: task, split and number of the document, for messages.
        turns: of the prompt.
        pictures: for its placeholders.
    """

    name: str
    turns: list[Turn]
    pictures: list[Picture]


def asked(
    context: Any, visuals: Callable[[Any], Any] | None, documents: Mapping[str, Any], where: Sequence[Any]
) -> Asked:
    """The question of a request.

    Args:
        context: the text; pictures stand where it has `<image>`, or before it.
        visuals: gives the pictures of a document.
        documents: task -> split -> documents.
        where: number of the document, task, split; nothing for a request without a document.
    """
    if not where:
        return question("a request", context, [])
    number, task, split = where
    shown = visuals(documents[task][split][number]) if callable(visuals) else None
    return question(f"{task}, {split}, document {number}", context, shown)


def question(name: str, context: Any, shown: Any) -> Asked:
    """A text and the pictures that are shown with it (None, or a list that may hold None)."""
    text = str(context[0] if isinstance(context, (list, tuple)) else context)
    pictures = [_picture(one, name) for one in (shown or []) if one is not None]
    return Asked(name, [Turn("user", with_places(text, len(pictures)))], pictures)


def decoding_of(settings: Mapping[str, Any]) -> Decoding:
    """Decoding as a task's `generation_kwargs` say; keys that megamm has no use for are left out.

    It is sampled if `do_sample` says so, or, where that is not given, if there is a temperature; never at
    temperature 0.
    """
    until = settings.get("until") or []
    texts = [until] if isinstance(until, str) else list(until)
    temperature = float(settings.get("temperature") or 0)
    sample = bool(settings.get("do_sample", temperature > 0))
    if sample and settings.get("temperature") is None:
        temperature = 1.0
    return Decoding(
        max_new_tokens=int(settings.get("max_new_tokens") or _LONGEST),
        beams=int(settings.get("num_beams") or 1),
        sample=sample and temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_p=float(settings.get("top_p") or 1.0),
        length_penalty=float(_given(settings, "length_penalty")),
        repetition_penalty=float(_given(settings, "repetition_penalty")),
        stop=tuple(text for text in texts if text),
    )


def _given(settings: Mapping[str, Any], key: str) -> Any:
    value = settings.get(key)
    return 1.0 if value is None else value


def _picture(visual: Any, name: str) -> Picture:
    if not isinstance(visual, Image.Image):
        raise InputError(
            f"{name}: shows a {type(visual).__name__}, and megamm sees pictures; leave the task out"
        )
    file = io.BytesIO()
    (visual if visual.mode in _PLAIN else visual.convert("RGB")).save(file, "PNG", compress_level=1)
    return file.getvalue()
