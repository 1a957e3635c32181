"""Real pictures for the quick start: the 1,797 handwritten digits of scikit-learn as PNG files,
and questions about them in LLaVA's JSON format.

    python examples/quickstart/make_data.py --out runs/quickstart-data

writes images/train/NNNN-D.png, images/heldout/NNNN.png, train.json (conversations of several turns)
and heldout.json (single questions, four kinds with balanced answers). A training digit is drawn three
times, each time placed, turned and lit a little differently. The split is by digit: none, in whatever
role, is on both sides. The same seed always gives the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HELDOUT_SHARE = 0.2
DRAWINGS = 3  # pictures made of each training digit, as if it had been photographed so often
CONVERSATIONS = 4  # about each training digit, of which the second half looks at a second picture as well
QUESTIONS_PER_KIND = 250  # held out
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Answer = Callable[..., str]


def as_word(digit: int) -> str:
    return WORDS[digit]


def is_even(digit: int) -> str:
    return "yes" if digit % 2 == 0 else "no"


def is_large(digit: int) -> str:
    return "yes" if digit > 5 else "no"


def larger_of(first: int, second: int) -> str:
    return "equal" if first == second else "first" if first > second else "second"


@dataclass(frozen=True)
class Kind:
    """One kind of question: its phrasings, and the answer as a function of the digits shown."""

    phrasings: tuple[str, ...]
    answer: Answer


ONE_IMAGE = {
    "digit": Kind(("What digit is this?", "Which digit is shown?", "Read the digit."), as_word),
    "even": Kind(("Is the digit even?", "Is this an even number?", "Is it even?"), is_even),
    "larger": Kind(
        ("Is the digit larger than five?", "Is this more than five?", "Is it larger than five?"), is_large
    ),
}
COMPARE = Kind(
    (
        "Which digit is larger, the first or the second?",
        "Which of the two is larger?",
        "Compare the two digits: which is larger?",
    ),
    larger_of,
)
FIRST = Kind(("What is the first digit?", "Read the first digit."), lambda first, second: WORDS[first])
SECOND = Kind(("What is the second digit?", "Read the second digit."), lambda first, second: WORDS[second])


@dataclass(frozen=True)
class Picture:
    path: str  # relative to the folder of the JSON files
    digit: int
    source: int  # index of the handwritten digit


def split_by_class(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Boolean [num_images]: held out or not; every digit in proportion (largest remainder)."""
    counts = np.bincount(labels)
    exact = counts * HELDOUT_SHARE
    take = np.floor(exact).astype(int)
    missing = round(exact.sum()) - take.sum()
    take[np.argsort(take - exact, kind="stable")[:missing]] += 1
    heldout = np.zeros(len(labels), dtype=bool)
    for digit, number in enumerate(take):
        heldout[rng.permutation(np.flatnonzero(labels == digit))[:number]] = True
    return heldout


def placed(low: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """`low` enlarged to `size`, turned by up to 10 degrees, scaled and moved a little."""
    angle, zoom = np.deg2rad(rng.uniform(-10, 10)), low.width / size / rng.uniform(0.92, 1.1)
    cos, sin, centre = zoom * np.cos(angle), zoom * np.sin(angle), low.width / 2
    x, y = rng.uniform(-0.05, 0.05, size=2) * low.width + centre
    coefficients = (cos, sin, x - (cos + sin) * size / 2, -sin, cos, y - (cos - sin) * size / 2)
    return low.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)


def draw(strokes: np.ndarray, size: int, rng: np.random.Generator, upright: bool) -> Image.Image:
    """A digit ([8, 8], 0 to 16) as a picture: smooth ink on slightly tinted, unevenly lit paper."""
    low = Image.fromarray((np.pad(strokes, 1) * (255 / 16)).astype(np.uint8))  # with a margin of paper
    high = low.resize((size, size), Image.Resampling.BICUBIC) if upright else placed(low, size, rng)
    ink = np.asarray(high, dtype=np.float32) / 255
    ink = (ink * ink * (3 - 2 * ink))[..., None]  # smoothstep: firmer edges
    paper_colour = np.float32(rng.uniform(215, 250) + rng.uniform(-8, 8, size=3))
    ink_colour = np.float32(rng.uniform(10, 60) + rng.uniform(-10, 45, size=3))
    slope_x, slope_y = np.float32(rng.uniform(-0.06, 0.06, size=2))
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + slope_x * ramp[None, :, None] + slope_y * ramp[:, None, None]
    pixels = (paper_colour * (1 - ink) + ink_colour * ink) * light
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_pictures(out: Path, size: int, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Write every digit as a PNG; returns the training pictures and the held-out ones."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    heldout = split_by_class(digits.target, np.random.default_rng([seed, 0]))
    sides: tuple[list[Picture], list[Picture]] = ([], [])
    for index, (strokes, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        names = (
            [f"heldout/{index:04d}"]
            if heldout[index]
            else [f"train/{index:04d}-{d}" for d in range(DRAWINGS)]
        )
        for number, name in enumerate(names):
            picture = Picture(f"images/{name}.png", int(digit), index)
            (out / picture.path).parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, 1, index, number])
            draw(strokes, size, rng, upright=bool(heldout[index])).save(out / picture.path, compress_level=1)
            sides[int(heldout[index])].append(picture)
    return sides


def turns(
    kinds: Sequence[Kind], pictures: Sequence[Picture], rng: np.random.Generator
) -> list[dict[str, str]]:
    """The conversation that asks `kinds` in order; the pictures stand before the first question."""
    conversation = []
    for number, kind in enumerate(kinds):
        images = "<image>\n" * len(pictures) if number == 0 else ""
        question = kind.phrasings[rng.integers(len(kind.phrasings))]
        answer = kind.answer(*(picture.digit for picture in pictures))
        conversation += [{"from": "human", "value": images + question}, {"from": "gpt", "value": answer}]
    return conversation


def entry(name: str, pictures: Sequence[Picture], conversation: list[dict[str, str]]) -> dict[str, Any]:
    """One item of LLaVA's JSON; "image" is a path, or a list of paths where there are several."""
    paths = [picture.path for picture in pictures]
    return {"id": name, "image": paths[0] if len(paths) == 1 else paths, "conversations": conversation}


def partner(of: Picture, answer: str, pool: Sequence[Picture], rng: np.random.Generator) -> Picture | None:
    """A picture of `pool` that makes `answer` the right comparison with `of`, if there is one."""
    fitting = [p for p in pool if p.source != of.source and larger_of(of.digit, p.digit) == answer]
    return fitting[rng.integers(len(fitting))] if fitting else None


def training_entries(pictures: Sequence[Picture], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Conversations about one picture in random order of kinds, so that every kind also stands first,
    and about two."""
    entries = []
    answers = ("first", "second", "equal")
    for first in range(0, len(pictures), DRAWINGS):
        for repeat in range(CONVERSATIONS):
            picture = pictures[first + repeat % DRAWINGS]
            shown = [picture]
            kinds = list(ONE_IMAGE.values())
            if repeat >= CONVERSATIONS // 2:
                other = partner(picture, answers[rng.integers(3)], pictures, rng)
                if other is not None:
                    shown, kinds = [picture, other], [COMPARE, FIRST, SECOND]
            order = [kinds[i] for i in rng.permutation(len(kinds))]
            if COMPARE in order:  # asked after the digits were named, it would need no look at the pictures
                order.sort(key=lambda kind: kind is not COMPARE)
            conversation = turns(order, shown, rng)
            entries.append(entry(f"train-{len(entries):05d}", shown, conversation))
    return [entries[i] for i in rng.permutation(len(entries))]


def heldout_entries(pictures: Sequence[Picture], rng: np.random.Generator) -> list[dict[str, Any]]:
    """`QUESTIONS_PER_KIND` single questions of each kind; the answers of a kind are equally frequent."""
    entries: list[dict[str, Any]] = []

    def ask(name: str, kind: Kind, shown: Sequence[Picture]) -> None:
        item = entry(f"heldout-{len(entries):05d}", shown, turns([kind], shown, rng))
        entries.append(item | {"kind": name})

    for name, kind in ONE_IMAGE.items():
        by_answer: dict[str, list[Picture]] = {}
        for i in rng.permutation(len(pictures)):
            by_answer.setdefault(kind.answer(pictures[i].digit), []).append(pictures[i])
        groups = [by_answer[answer] for answer in sorted(by_answer)]
        for number in range(QUESTIONS_PER_KIND):
            group = groups[number % len(groups)]
            ask(name, kind, [group[number // len(groups) % len(group)]])
    answers = ("first", "second", "equal")
    while len(entries) < (len(ONE_IMAGE) + 1) * QUESTIONS_PER_KIND:
        picture = pictures[rng.integers(len(pictures))]
        other = partner(picture, answers[len(entries) % 3], pictures, rng)
        if other is not None:
            ask("compare", COMPARE, [picture, other])
    return entries


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=160, help="edge of the pictures in pixels (default 160)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the colours and the questions")
    args = parser.parse_args()
    if args.size < 8:
        parser.error("--size: a digit has 8 x 8 strokes; give 8 or more")
    if args.seed < 0:
        parser.error("--seed: give 0 or more")
    train, heldout = write_pictures(args.out, args.size, args.seed)
    conversations = training_entries(train, np.random.default_rng([args.seed, 2]))
    questions = heldout_entries(heldout, np.random.default_rng([args.seed, 3]))
    write_json(args.out / "train.json", conversations)
    write_json(args.out / "heldout.json", questions)
    print(
        f"{args.out}: {len(train)} + {len(heldout)} pictures, {len(conversations)} training conversations, "
        f"{len(questions)} held-out questions"
    )


if __name__ == "__main__":
    main()
