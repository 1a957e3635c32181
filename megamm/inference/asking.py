"""From questions to ids and from ids to answers: prompts, their pictures, and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.data.image_file import load_image
from megamm.data.images import ImageLoader, make_image_loader
from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError
from megamm.inference.decoding import Decoding
from megamm.inference.search import Vocabulary

Picture = str | Path | bytes  # a file, or what is in one


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes:
        tokens_per_image: positions that an image takes in the sequence.
        max_positions: of the model.
    """

    tokenizer: Tokenizer
    template: Template
    tokens_per_image: int
    max_positions: int

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Tokenizer, template: Template | None = None) -> Asking:
        """As the recipe says; `template` instead of its own."""
        model = recipe.model
        template = template or Template.by_name(recipe.template)
        return cls(tokenizer, template, model.tokens_per_image, model.language.max_positions)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Prompt ids with every placeholder repeated for each position that its image takes.

        Raises:
            InputError: the turns do not end with a question, or the template takes no questions.
        """
        return self.with_image_positions(self.template.prompt(turns, self.tokenizer))

    def check_length(self, longest: int, max_new_tokens: int, option: str) -> None:
        """As the function of this name, for this model."""
        check_length(longest, max_new_tokens, self.max_positions, option)

    @property
    def words(self) -> Vocabulary:
        """What answers are made of."""
        tokenizer = self.tokenizer
        stops = frozenset(self.template.stop_ids(tokenizer))
        return Vocabulary(tokenizer.vocab_size, stops, [tokenizer.image_id], tokenizer.decode)

    def text(self, answer: Sequence[int], decoding: Decoding) -> str:
        """The text of an answer, up to what ends it."""
        text = self.tokenizer.decode(answer)
        ends = [place for stop in decoding.stop if (place := text.find(stop)) >= 0]
        return text[: min(ends)].strip() if ends else text.strip()

    def raw_prompt(self, text: str) -> list[int]:
        """Prompt ids of a text that stands as it is, with special tokens and placeholders in it."""
        tokenizer = self.tokenizer
        parts = tokenizer.cut(text, self.template.control_tokens(tokenizer))
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return self.with_image_positions([*begin, *tokenizer.encode_parts(parts)])

    def with_image_positions(self, ids: Sequence[int]) -> list[int]:
        """The ids with every placeholder repeated for each position that its image takes."""
        image_id = self.tokenizer.image_id
        return [i for t in ids for i in ([t] * self.tokens_per_image if t == image_id else [t])]


def check_length(longest: int, max_new_tokens: int, max_positions: int, option: str) -> None:
    """Raise InputError if a prompt of `longest` positions leaves no room; `option` is what to lower."""
    if longest + max_new_tokens > max_positions:
        raise InputError(
            f"a prompt of {longest} positions and {max_new_tokens} new tokens exceed the model's "
            f"{max_positions} positions; shorten the prompt or lower {option}"
        )


def check_placeholders(text: str, num_images: int, name: str) -> None:
    """Raise InputError if the conversation `name` has not one picture for each placeholder."""
    placeholders = text.count(IMAGE_TOKEN)
    if placeholders != num_images:
        raise InputError(
            f"{name}: {placeholders} {IMAGE_TOKEN} placeholders, but {num_images} pictures; "
            "give one picture for each placeholder"
        )


def evaluation_loader(recipe: Recipe) -> ImageLoader:
    """What makes exactly the pixels that the exported model's processor makes."""
    config = replace(recipe.data.image, loader="pillow")
    return make_image_loader(config, recipe.model.vision.image_size, training=False)


def load_pictures(pictures: Sequence[Picture], loader: ImageLoader) -> torch.Tensor:
    """[N, 3, H, W] pixels of pictures.

    Raises:
        InputError: one is missing or unreadable.
    """
    size = loader.image_size
    pixels = [load_image(picture, loader) for picture in pictures]
    return torch.stack(pixels) if pixels else torch.empty(0, 3, size, size)


def padded(sequences: Sequence[Sequence[int]], pad_id: int, multiple: int = 1) -> torch.Tensor:
    """[B, S] int64, S a multiple of `multiple`. Padding comes last, so causal attention never sees it."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), -(-longest // multiple) * multiple), pad_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
    return ids


def question_batch(
    input_ids: torch.Tensor, images: torch.Tensor, image_token_id: int, tokens_per_image: int
) -> Batch:
    """A batch without labels of [B, S] ids and the [N, 3, H, W] images of all rows."""
    positions = (input_ids == image_token_id).sum(dim=1)
    return Batch(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        position_ids=torch.arange(input_ids.shape[1]).expand_as(input_ids),
        images=images.float(),
        images_per_sample=positions // tokens_per_image,
        sample_ids=torch.arange(input_ids.shape[0]),
    )
