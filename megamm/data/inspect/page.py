"""The HTML of `megamm data preview`: one page that needs nothing else and runs nothing.

Everything that comes out of the dataset is escaped, and the page's own policy forbids scripts and
whatever would be fetched, so that hostile text stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple, Optional

from megamm.data.inspect.page_style import STYLE
from megamm.data.inspect.token_text import Piece
from megamm.pages import frame
from megamm.pages.text import escaped

CLASSES = {"plain": "", "special": " s", "image": " i", "part": "", "foreign": " x"}


class Picture(NamedTuple):
    """One image of a sample.

    Attributes:
        name, source: of its file and of the folder or tar that holds it.
        facts: size and the like.
        uri: a small version of it, as a data URI; None: it cannot be used, and `reason` says why.
        lost: truncation takes it.
    """

    name: str
    source: str
    facts: str
    uri: Optional[str]
    reason: str
    lost: bool


class Shown(NamedTuple):
    """One sample.

    Attributes:
        row: of the dataset; facts: numbers in a few words.
        pieces, learnt: its tokens, and which of them carry loss.
        cut: tokens that truncation leaves; None: all.
        cut_text: what truncation does to it.
        hidden_tokens, hidden_pictures: that are not shown because there are too many.
        error: why it cannot be read.
    """

    row: int
    facts: Sequence[str]
    pieces: Sequence[Piece] = ()
    learnt: Sequence[bool] = ()
    pictures: Sequence[Picture] = ()
    cut: Optional[int] = None
    cut_text: str = ""
    hidden_tokens: int = 0
    hidden_pictures: int = 0
    error: str = ""


def head(title: str, summary: str, facts: dict[str, str], rows: Sequence[int]) -> Iterator[str]:
    """The page up to the first sample; `facts` are told behind a fold."""
    yield frame.head(title, STYLE)
    yield f'<header>\n<h1>{escaped(title)}</h1>\n<p class="facts">{escaped(summary)}</p>\n'
    yield "<details><summary>What the manifest says</summary><dl>\n"
    yield from (f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>\n" for name, value in facts.items())
    yield '</dl></details>\n<nav aria-label="samples">'
    yield from (f'<a href="#row-{row}">row {row}</a>' for row in rows)
    yield "</nav>\n" + _legend() + "</header>\n<main>\n"


def foot() -> str:
    """The end of the page."""
    return "</main>\n" + frame.foot()


def article(sample: Shown) -> Iterator[str]:
    """One sample."""
    yield f'<article id="row-{sample.row}">\n<div class="top"><h2>Row {sample.row}</h2>'
    yield from (f"<span>{escaped(fact)}</span>" for fact in sample.facts)
    yield "</div>\n"
    if sample.error:
        yield f'<p class="bad">This sample cannot be read: {escaped(sample.error)}</p>\n'
    if sample.pictures:
        yield '<div class="pictures">\n'
        for number, picture in enumerate(sample.pictures, start=1):
            yield _figure(number, picture)
        yield "</div>\n"
    if sample.hidden_pictures:
        yield f'<p class="note">and {sample.hidden_pictures} more images</p>\n'
    if sample.pieces:
        yield '<div class="text">'
        yield from _tokens(sample)
        yield "</div>\n"
    if sample.hidden_tokens:
        yield f'<p class="note">and {sample.hidden_tokens} more tokens</p>\n'
    yield "</article>\n"


def _tokens(sample: Shown) -> Iterator[str]:
    mark = f'<span class="cut" role="separator">{escaped(sample.cut_text)}</span>'
    images = 0
    for number, (piece, learnt) in enumerate(zip(sample.pieces, sample.learnt, strict=True)):
        if number == sample.cut:
            yield mark + '<span class="gone">'
        text = piece.text
        if piece.kind == "image":
            images += 1
            text = f"{text}{images}"
        style = "t" + CLASSES[piece.kind] + (" l" if learnt else "")
        shown = escaped(text, soft=True) if piece.kind != "part" else "·"
        label = piece.label + (" · learnt" if learnt else "")
        yield f'<span class="{style}" data-i="{escaped(label)}">{shown}</span>'
    if sample.cut is not None and sample.cut < len(sample.pieces):
        yield "</span>"
    elif sample.cut is not None and not sample.hidden_tokens:
        yield mark


def _figure(number: int, picture: Picture) -> str:
    name = escaped(picture.name) or "(no name)"
    if picture.uri is not None:
        content = f'<img src="{escape(picture.uri)}" alt="image {number}: {name}" loading="lazy">'
    else:
        content = f'<div class="bad" role="img" aria-label="unreadable image">{escaped(picture.reason)}</div>'
    lost = " · lost to truncation" if picture.lost else ""
    style = ' class="lost"' if picture.lost else ""
    return (
        f"<figure{style}>{content}<figcaption>{number} · {name}<br>{escaped(picture.facts + lost)}<br>"
        f"{escaped(picture.source)}</figcaption></figure>\n"
    )


def _legend() -> str:
    items = [
        ("t l", "answer", "carries loss"),
        ("t", "question", "does not"),
        ("t s", "&lt;/s&gt;", "special token"),
        ("t i", "&lt;image&gt;1", "stands for image 1"),
        ("t", "⏎", "newline"),
        ("t", "·", "further token of the same character"),
    ]
    parts = [f'<span><span class="{style}">{text}</span> {what}</span>' for style, text, what in items]
    return f'<div class="legend">{"".join(parts)}<span>id and text of a token: point at it</span></div>\n'
