"""Answers that the model gave during training, from RUN_DIR/samples/step-N/samples.json: for each question
the pictures once, and what was answered at the newest steps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megamm.config import ImageConfig
from megamm.data.image_header import ImageError
from megamm.data.thumbnail import thumbnail
from megamm.pages.text import escaped
from megamm.whole_files import read_whole

STEPS, QUESTIONS, PICTURES = 6, 24, 4  # newest steps, questions, pictures of each
MAX_CHARACTERS = 1500  # of a question or an answer
BUDGET = 3 << 20  # characters that all pictures together may take
_FOLDER = re.compile(r"step-(\d+)")


class Panel(NamedTuple):
    """A question.

    Attributes:
        answer: the true one, where it is known.
        folder: where the pictures lie.
        predictions: (step, what the model answered), newest first.
    """

    question: str
    answer: str
    folder: Path
    images: list[str]
    predictions: list[tuple[int, str]]


def read_panels(directory: Path, last_step: int) -> list[Panel]:
    """The panels of the newest steps up to `last_step` (others are of an earlier run), by question."""
    panels: dict[tuple[int, str], Panel] = {}
    for step, folder in _folders(directory, last_step)[:STEPS]:
        for number, row in enumerate(_rows(folder / "samples.json")):
            question = str(row.get("question", ""))
            prediction = (step, str(row.get("prediction", "")))
            known = panels.get((number, question))
            if known is not None:
                known.predictions.append(prediction)
                continue
            images = row.get("images")
            names = [str(name) for name in images] if isinstance(images, list) else []
            answer = str(row.get("answer") or "")
            panels[number, question] = Panel(question, answer, folder, names, [prediction])
    return list(panels.values())


def _folders(directory: Path, last_step: int) -> list[tuple[int, Path]]:
    """Steps and their folders, newest first."""
    if not directory.is_dir():
        return []
    named = ((_FOLDER.fullmatch(path.name), path) for path in directory.iterdir() if path.is_dir())
    found = ((int(name[1]), path) for name, path in named if name is not None)
    return sorted(((step, path) for step, path in found if step <= last_step), reverse=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError):
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def panels_html(panels: list[Panel]) -> Iterator[str]:
    """The panels."""
    left = BUDGET
    yield '<div class="panels">\n'
    for panel in panels[:QUESTIONS]:
        yield '<article class="card panel">\n'
        if panel.images:
            yield '<div class="pictures">'
            for name in panel.images[:PICTURES]:
                html = _picture(panel.folder, name, left)
                left -= len(html)
                yield html
            if len(panel.images) > PICTURES:
                yield f'<p class="note">and {len(panel.images) - PICTURES} more pictures</p>'
            yield "</div>\n"
        yield f'<div><p class="question">{_said(panel.question)}</p>\n<table class="answers">\n'
        if panel.answer:
            yield f'<tr class="truth"><th>answer</th><td>{_said(panel.answer)}</td></tr>\n'
        for step, prediction in panel.predictions:
            yield f"<tr><th>step {step:,}</th><td>{_said(prediction)}</td></tr>\n"
        yield "</table></div></article>\n"
    yield "</div>\n"
    if len(panels) > QUESTIONS:
        yield f'<p class="note">and {len(panels) - QUESTIONS} more questions</p>\n'


def _picture(folder: Path, name: str, budget: int) -> str:
    shown = escaped(name)
    if budget <= 0:
        return f'<p class="note">{shown}: left out, the page is large enough</p>'
    try:
        if Path(name).name != name:
            raise ImageError("not a file of this step")
        uri, _ = thumbnail(read_whole(folder / name), ImageConfig().max_pixels)
    except OSError as error:
        return f'<p class="bad">{shown}: {escaped(str(error.strerror))}</p>'
    except Exception as error:  # decoders meet damaged bytes with exceptions of any kind
        return f'<p class="bad">{shown}: {escaped(str(error))}</p>'
    return f'<img src="{uri}" alt="{shown}" loading="lazy">'


def _said(text: str) -> str:
    """A text of a person or a model, in which line breaks are line breaks."""
    cut = text[:MAX_CHARACTERS] + (" …" if len(text) > MAX_CHARACTERS else "")
    return "<br>".join(escaped(line) for line in cut.split("\n")) or '<span class="note">(nothing)</span>'
