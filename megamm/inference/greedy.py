"""From questions to answers, whatever computes the logits: prompts, their checks, and the greedy loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megamm.batch import IGNORE_INDEX, Batch
from megamm.config import Recipe
from megamm.data.image_file import load_image_file
from megamm.data.images import ImageLoader, make_image_loader
from megamm.data.templates import Template, Turn
from megamm.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megamm.errors import InputError

# [B, V] logits of the token that follows each of B sequences of ids
NextLogits = Callable[[list[list[int]]], torch.Tensor]


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
        image_id = self.tokenizer.image_id
        ids = self.template.prompt(turns, self.tokenizer)
        return [i for t in ids for i in ([t] * self.tokens_per_image if t == image_id else [t])]

    def check_length(self, longest: int, max_new_tokens: int, option: str) -> None:
        """Raise InputError if a prompt of `longest` positions leaves no room; `option` is what to lower."""
        if longest + max_new_tokens > self.max_positions:
            raise InputError(
                f"a prompt of {longest} positions and {max_new_tokens} new tokens exceed the model's "
                f"{self.max_positions} positions; shorten the prompt or lower {option}"
            )

    def answer(self, prompts: Sequence[Sequence[int]], logits: NextLogits, max_new_tokens: int) -> list[str]:
        """The greedy answers to prompts of ids."""
        answers = self.greedy(prompts, logits, max_new_tokens)
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def greedy(
        self, prompts: Sequence[Sequence[int]], next_logits: NextLogits, max_new_tokens: int
    ) -> list[list[int]]:
        """The ids of the answers. Of equal logits the lowest id counts, so ranks with the same logits agree.

        The whole sequence is computed again for every new token (there is no key/value cache).
        """
        tokenizer, stops = self.tokenizer, set(self.template.stop_ids(self.tokenizer))
        sequences = [list(prompt) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for _ in range(max_new_tokens):
            if not open_rows:
                break
            logits = next_logits(sequences)
            logits[:, tokenizer.vocab_size :] = -torch.inf  # embeddings without a token
            logits[:, tokenizer.image_id] = -torch.inf
            best = logits.argmax(dim=-1).tolist()
            for row in list(open_rows):
                if best[row] in stops:
                    open_rows.discard(row)
                    continue
                answers[row].append(best[row])
                sequences[row].append(best[row])
        return answers


def check_placeholders(turns: Sequence[Turn], num_images: int, name: str) -> None:
    """Raise InputError if the conversation `name` has not one picture for each placeholder."""
    placeholders = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if placeholders != num_images:
        raise InputError(
            f"{name}: {placeholders} {IMAGE_TOKEN} placeholders, but {num_images} pictures; "
            "give one picture for each placeholder"
        )


def evaluation_loader(recipe: Recipe) -> ImageLoader:
    """What makes exactly the pixels that the exported model's processor makes."""
    config = replace(recipe.data.image, loader="pillow")
    return make_image_loader(config, recipe.model.vision.image_size, training=False)


def load_pictures(paths: Sequence[str | Path], loader: ImageLoader) -> torch.Tensor:
    """[N, 3, H, W] pixels of picture files.

    Raises:
        InputError: one is missing or unreadable.
    """
    size = loader.image_size
    pixels = [load_image_file(path, loader) for path in paths]
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
