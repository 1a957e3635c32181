"""Few-shot prompts: demonstrations of the training split before the question, as OpenFlamingo evaluates.

Which demonstrations a question gets follows from the seed and the question's id alone, so neither batches nor
restarts change it. They are drawn from a pool of 2048 training items, as there.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamm.data.tokenizer import IMAGE_TOKEN
from megamm.errors import InputError
from megamm.evaluation.tasks.item import Item
from megamm.evaluation.tasks.pictures import Source
from megamm.evaluation.tasks.prompts import Shots, Words, fill

POOL = 2048


@dataclass(frozen=True)
class Prompt:
    """What the model is given.

    Attributes:
        text: a question (one turn of a conversation), or a text to complete.
        images: in the order of their placeholders.
    """

    text: str
    images: tuple[Source, ...]


def draw_pool(items: Iterable[Item], seed: int, needed: int, need_images: bool) -> list[Item]:
    """At most POOL items with answers, each as likely as any other, in bounded memory.

    Args:
        seed: of the draw.
        needed: for one prompt.
        need_images: leave out items whose picture is not there.
    Raises:
        InputError: there are fewer than `needed`.
    """
    draw = random.Random(f"pool/{seed}")
    pool: list[Item] = []
    usable = (item for item in items if item.answer)
    for number, item in enumerate(usable):
        if number < POOL:
            pool.append(item)
        elif (place := draw.randrange(number + 1)) < POOL:
            pool[place] = item
    if need_images:
        pool = [item for item in pool if all(image.is_there() for image in item.images)]
    if len(pool) < needed:
        raise InputError(
            f"--demonstrations: {len(pool)} items with an "
            f"answer{' and a picture' if need_images else ''}, but "
            f"{needed} are needed; give the training split, and its pictures with --images"
        )
    return pool


def few_shot_prompt(
    item: Item, words: Words, how: Shots, pool: Sequence[Item], shots: int, seed: int
) -> Prompt:
    """The question behind its demonstrations.

    Args:
        pool: to draw demonstrations from.
        shots: demonstrations; with 0, some without their pictures stand there instead.
        seed: of the draw.
    """
    draw = random.Random(f"{seed}/{item.id}")
    chosen = draw.sample(pool, shots or how.blind)
    shown = "".join(fill(words.shot, _pieces(each)) + how.join for each in chosen)
    images = [image for each in chosen for image in each.images] if shots else []
    if not shots:
        shown = shown.replace(IMAGE_TOKEN, "")
    return Prompt(shown + fill(words.ask, _pieces(item)), (*images, *item.images))


def _pieces(item: Item) -> dict[str, str]:
    return {"question": item.question, "answer": item.answer.strip()}


def cut_answer(text: str, words: Words) -> str:
    """A completion up to where the next demonstration would begin, without what the set drops."""
    for end in words.end:
        text = re.split(re.escape(end), text, maxsplit=1)[0]
    for unwanted in words.drop:
        text = text.replace(unwanted, "")
    return text.strip()
