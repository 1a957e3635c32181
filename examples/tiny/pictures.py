"""Pictures of handwritten digits, drawn by examples/quickstart/make_data.py, and what can be said of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
import make_data
from make_data import Picture

SEED = 0
DIGITS, HELDOUT = 100, 24  # a training digit is drawn make_data.DRAWINGS times
SIZE = 64  # pixels

CAPTIONS = (
    "a handwritten {}",
    "the digit {} in dark ink",
    "a {} written by hand",
    "{} on pale paper, drawn with a pen",
)
SENTENCES = (
    "Here is a handwritten {}.",
    "The next one is a {}.",
    "This digit is a {}.",
    "Somebody wrote a {}.",
)


def draw(folder: Path) -> tuple[list[Picture], list[Picture]]:
    """The pictures for training and those held out, as files in `folder` named like those of COCO; drawn if
    they are not there. The same files every time."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    is_heldout = make_data.split_by_class(digits.target, np.random.default_rng([SEED, 0]))
    training = np.flatnonzero(~is_heldout)[:DIGITS].repeat(make_data.DRAWINGS)
    heldout = np.flatnonzero(is_heldout)[:HELDOUT]
    sources = [*training, *heldout]
    pictures = [
        Picture(f"{number:012d}.jpg", int(digits.target[source]), int(source))
        for number, source in enumerate(sources)
    ]
    if not folder.exists():
        unfinished = folder.with_name(folder.name + ".unfinished")
        unfinished.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            rng = np.random.default_rng([SEED, 1, number])
            upright = number >= len(training)
            drawn = make_data.draw(digits.images[picture.source], SIZE, rng, upright)
            drawn.save(unfinished / picture.path, quality=92)
        unfinished.rename(folder)
    return pictures[: len(training)], pictures[len(training) :]


def caption(picture: Picture, rng: np.random.Generator) -> str:
    """A few words about it."""
    return CAPTIONS[rng.integers(len(CAPTIONS))].format(make_data.as_word(picture.digit))


def question(picture: Picture, rng: np.random.Generator) -> tuple[str, str]:
    """A question about it, and the answer in one word."""
    kinds = list(make_data.ONE_IMAGE.values())
    kind = kinds[rng.integers(len(kinds))]
    return kind.phrasings[rng.integers(len(kind.phrasings))], kind.answer(picture.digit)


def document(pictures: list[Picture], rng: np.random.Generator) -> list[str]:
    """A sentence for each picture."""
    words = [make_data.as_word(picture.digit) for picture in pictures]
    return [SENTENCES[rng.integers(len(SENTENCES))].format(word) for word in words]


def conversations(pictures: list[Picture], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Conversations of three turns in LLaVA's layout, about one picture or two."""
    return make_data.training_entries(pictures, rng)


def questions(pictures: list[Picture], has_words: bool) -> list[dict[str, Any]]:
    """One question about each picture in LLaVA's layout; without words, what it shows is the answer."""
    rng = np.random.default_rng([SEED, 2])
    entries = []
    for number, picture in enumerate(pictures):
        asked, answer = question(picture, rng) if has_words else ("", caption(picture, rng))
        turns = [
            {"from": "human", "value": f"<image>\n{asked}".strip()},
            {"from": "gpt", "value": answer},
        ]
        entries.append(make_data.entry(f"heldout-{number}", [picture], turns))
    return entries
